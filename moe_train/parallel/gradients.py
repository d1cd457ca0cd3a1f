"""Gradients over ranks: dense parameters over all of them, experts over their replicas, both as one process would.

The convention: each rank's loss is its share, so that the sum over ranks is the loss of one process. Then

- the gradient of a dense parameter is the sum over all ranks,
- that of an expert is the sum over its replicas alone: tokens of its own group have already reached it in backward.

Where something else averages the dense ones (DDP), experts are divided by the same world size, not by their replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.parallel.layout import ExpertLayout

_BUCKET_BYTES = 25 << 20


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter belongs to experts (and so is not the same on every rank)."""
    return bool(getattr(parameter, "expert", False))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Experts' parameters by name."""
    return {name: p for name, p in model.named_parameters() if is_expert(p)}


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All other parameters by name: the same on every rank."""
    return {name: p for name, p in model.named_parameters() if not is_expert(p)}


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Tells torch's DistributedDataParallel to leave experts alone; call it before wrapping ``model``.

    Afterwards call :func:`reduce_expert_gradients` with ``divide_by`` = the world size, since DDP averages.
    """
    names = list(expert_parameters(model))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def reduce_dense_gradients(parameters: Iterable[nn.Parameter], divide_by: float = 1.0) -> None:
    """Sums the gradients of dense parameters over all ranks. Missing ones count as zero, on any rank."""
    group = dist.group.WORLD if dist.is_initialized() else None
    _reduce((p for p in parameters if not is_expert(p)), group, divide_by)


def reduce_expert_gradients(parameters: Iterable[nn.Parameter], layout: ExpertLayout, divide_by: float = 1.0) -> None:
    """Sums the gradients of experts over their replicas. Missing ones count as zero."""
    _reduce((p for p in parameters if is_expert(p)), layout.replica_group, divide_by)


def expert_square_sum(parameters: Iterable[nn.Parameter], layout: ExpertLayout) -> Tensor:
    """Σ of squared gradients over all experts of all ranks of a group, 0-dim fp32; the same on every rank.

    Each expert counts once: replicas hold the same gradient after :func:`reduce_expert_gradients`.
    """
    grads = [p.grad for p in parameters if is_expert(p) and p.grad is not None]
    device = grads[0].device if grads else _device(layout)
    total = torch.stack([_square(g) for g in grads]).sum() if grads else torch.zeros((), device=device)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    for group in layout.expert_groups:
        dist.all_reduce(total, group=group)
    return total


def gradient_norm(parameters: Iterable[nn.Parameter], layout: ExpertLayout) -> Tensor:
    """The 2-norm of the whole model's gradient as one process would compute it, 0-dim; after the reductions."""
    known = list(parameters)
    experts = expert_square_sum(known, layout)
    dense = [_square(p.grad) for p in known if not is_expert(p) and p.grad is not None]
    return (torch.stack([*dense, experts.to(dense[0].dtype)]).sum() if dense else experts).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, layout: ExpertLayout) -> Tensor:
    """Scales all gradients so that their norm is at most ``max_norm`` (0: leaves them); returns the norm before."""
    known = list(parameters)
    norm = gradient_norm(known, layout)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(known, max_norm, norm)
    return norm


def same_on_replicas(parameters: Mapping[str, nn.Parameter], layout: ExpertLayout) -> list[str]:
    """Names of parameters that differ between ranks that should hold the same values; for checks, not for training."""
    wrong = []
    for name, parameter in parameters.items():
        group = layout.replica_group if is_expert(parameter) else (dist.group.WORLD if layout.mesh else None)
        if group is None:
            continue
        low, high = parameter.detach().clone(), parameter.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        if not torch.equal(low, high):
            wrong.append(name)
    return wrong


def _reduce(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, divide_by: float) -> None:
    known = [p for p in parameters if p.requires_grad]
    alone = group is None or dist.get_world_size(group) == 1
    for parameter in known:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not alone:
        for bucket in _buckets([p.grad for p in known if p.grad is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat, group=group)
            for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
    if known and divide_by != 1.0:
        torch._foreach_div_([p.grad for p in known if p.grad is not None], divide_by)


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type at a time, in their order, up to a bucket's size."""
    by_type: dict[torch.dtype, list[list[Tensor]]] = {}
    for grad in grads:
        buckets = by_type.setdefault(grad.dtype, [[]])
        if sum(g.nbytes for g in buckets[-1]) + grad.nbytes > _BUCKET_BYTES and buckets[-1]:
            buckets.append([])
        buckets[-1].append(grad)
    return chain.from_iterable(by_type.values())


def _square(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return norm.square()


def _device(layout: ExpertLayout) -> torch.device:
    return torch.device(layout.mesh.device_type if layout.mesh is not None else "cpu")
