"""Gradient reduction over ranks: dense parameters over all ranks, expert parameters over their replicas.

Each rank's loss is its share of the loss of one process: the sum over ranks is the whole loss. Then

- the gradient of a dense parameter is the sum over all ranks;
- the gradient of an expert is the sum over its replicas only, since backward's all-to-alls already brought it the
  gradients from all tokens of its expert group.

Where DDP averages the dense gradients, expert gradients are divided by the same world size, not by the replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.parallel.layout import ExpertLayout

_BUCKET_BYTES = 25 << 20
T = TypeVar("T", bound=Tensor)


class LocalNorms:
    """Norms of gradients before they are reduced; afterwards a NaN is on every rank."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []

    def record(self, gradients: Iterable[Tensor]) -> None:
        """Records the 2-norm of each, without a host sync. On a CPU torch's maximum norm takes 15 times as long."""
        self._norms += [torch.linalg.vector_norm(gradient) for gradient in gradients]

    def all_finite(self, device: torch.device) -> Tensor:
        """Whether all norms since the last call were finite, 0-dim on ``device``."""
        norms, self._norms = self._norms, []
        return torch.isfinite(torch.stack(norms)).all() if norms else torch.ones((), dtype=torch.bool, device=device)


def is_expert(parameter: Tensor) -> bool:
    """Whether the parameter belongs to an expert, and so differs between ranks."""
    return bool(getattr(parameter, "expert", False))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Expert parameters by name."""
    return {name: p for name, p in model.named_parameters() if is_expert(p)}


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name that are the same on every rank."""
    return {name: p for name, p in model.named_parameters() if not is_expert(p)}


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Makes torch's DistributedDataParallel ignore expert parameters; call it before wrapping ``model``.

    Afterwards call :func:`reduce_expert_gradients` with ``divide_by`` = the world size, since DDP averages.
    """
    names = list(expert_parameters(model))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def reduce_dense_gradients(parameters: Iterable[nn.Parameter], divide_by: float = 1.0) -> None:
    """Sums the gradients of dense parameters over all ranks. A missing gradient counts as zero."""
    group = dist.group.WORLD if dist.is_initialized() else None
    _reduce((p for p in parameters if not is_expert(p)), group, divide_by)


def reduce_expert_gradients(parameters: Iterable[nn.Parameter], layout: ExpertLayout, divide_by: float = 1.0) -> None:
    """Sums the gradients of experts over their replicas. A missing gradient counts as zero."""
    _reduce((p for p in parameters if is_expert(p)), layout.replica_group, divide_by)


def expert_square_sum(parameters: Iterable[nn.Parameter], layout: ExpertLayout) -> Tensor:
    """Σ of squared gradients over all experts of an expert group, 0-dim fp32; the same on every rank.

    Call it after :func:`reduce_expert_gradients`. Replicas hold the same gradients, so each expert counts once.
    """
    grads = [p.grad for p in parameters if is_expert(p) and p.grad is not None]
    device = grads[0].device if grads else torch.device(layout.mesh.device_type if layout.mesh is not None else "cpu")
    total = torch.stack([_squared_norm(g) for g in grads]).sum() if grads else torch.zeros((), device=device)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    for group in layout.expert_groups:
        dist.all_reduce(total, group=group)
    return total


def gradient_norm(parameters: Iterable[nn.Parameter], layout: ExpertLayout) -> Tensor:
    """2-norm of the whole model's gradient, equal to that of one process, 0-dim. Call it after the reductions."""
    known = list(parameters)
    experts = expert_square_sum(known, layout)
    dense = [_squared_norm(p.grad) for p in known if not is_expert(p) and p.grad is not None]
    return (torch.stack([*dense, experts.to(dense[0].dtype)]).sum() if dense else experts).sqrt()


def _reduce(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, divide_by: float) -> None:
    known = [p for p in parameters if p.requires_grad]
    is_single = group is None or dist.get_world_size(group) == 1
    for parameter in known:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not is_single:
        for bucket in in_buckets([p.grad for p in known if p.grad is not None], _BUCKET_BYTES):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat, group=group)
            for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
    if known and divide_by != 1.0:
        torch._foreach_div_([p.grad for p in known if p.grad is not None], divide_by)


def in_buckets(tensors: Sequence[T], most_bytes: int) -> Iterator[list[T]]:
    """Tensors of one dtype each, in order, up to ``most_bytes`` a bucket unless one tensor has more."""
    by_type: dict[torch.dtype, list[list[T]]] = {}
    for tensor in tensors:
        buckets = by_type.setdefault(tensor.dtype, [[]])
        if sum(t.nbytes for t in buckets[-1]) + tensor.nbytes > most_bytes and buckets[-1]:
            buckets.append([])
        buckets[-1].append(tensor)
    return chain.from_iterable(by_type.values())


def _squared_norm(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return norm.square()
