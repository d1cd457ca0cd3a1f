"""Engine ``ddp``: torch's DistributedDataParallel; gradients of experts divided over ranks are reduced separately."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from moe_train.parallel.gradients import (
    expert_square_sum,
    ignore_experts_in_ddp,
    is_expert,
    reduce_expert_gradients,
)
from moe_train.training.engines.base import (
    EngineInputs,
    StepResult,
    load_named_optimizer_tensors,
    named_optimizer_tensors,
    register_engine,
)
from moe_train.training.optim.optimizer import build_optimizer
from moe_train.training.optim.precision import ComputeWeights, Precision, scaled_step


class LocalPeaks:
    """Largest absolute gradients before they are reduced; afterwards a NaN is on every rank."""

    def __init__(self) -> None:
        self._peaks: list[Tensor] = []

    def look(self, gradients: Iterable[Tensor]) -> None:
        """Records the peak of each, without a host sync."""
        self._peaks += [torch.linalg.vector_norm(gradient, float("inf")) for gradient in gradients]

    def all_finite(self, device: torch.device) -> Tensor:
        """Whether all gradients since the last call were finite, 0-dim on ``device``."""
        peaks, self._peaks = self._peaks, []
        return torch.isfinite(torch.stack(peaks)).all() if peaks else torch.ones((), dtype=torch.bool, device=device)


def _keep_buffers() -> dict[str, Any]:
    """No broadcast of buffers before each forward: routers compute theirs from world sums, the same on every rank."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


@register_engine("ddp")
class DdpEngine:
    """See :class:`moe_train.training.engines.base.Engine`. With one process there is no wrapper.

    DDP averages over ranks while the loss is a sum of shares, so :meth:`backward` multiplies by the number of ranks. If
    experts are divided over ranks, DDP ignores them: backward has given them the gradients of their whole group, and
    they are summed over replicas and divided by the number of ranks.

    In bf16 and fp16 the modules compute with 16-bit copies of the parameters (:class:`ComputeWeights`), whose gradients
    are added up over micro-batches and ranks in fp32.
    """

    def __init__(self, inputs: EngineInputs) -> None:
        self.module = inputs.module
        self._world, self._layout = inputs.world, inputs.layout
        self._divided = inputs.layout.plan.expert_parallel > 1
        self._clip_norm = inputs.training.clip_norm
        self._precision = Precision(inputs.training.precision, inputs.world.device)
        self._optimizer = build_optimizer(inputs.module, inputs.training.optimizer)
        self._weights = ComputeWeights(inputs.module, self._precision.half)
        self._peaks, self._expert_peaks = LocalPeaks(), LocalPeaks()
        self._wrapper = self._wrap(inputs) if inputs.world.size > 1 else None
        self.model: nn.Module = self._wrapper or self.module

    def _wrap(self, inputs: EngineInputs) -> DistributedDataParallel:
        device = inputs.world.device
        if self._divided:
            ignore_experts_in_ddp(self.module)
        if self._precision.half is not None:  # DDP gives all ranks the copies of rank 0 only
            for parameter in self.module.parameters():
                if not (self._divided and is_expert(parameter)):
                    dist.broadcast(parameter.detach(), src=0)
        with self._weights.in_use():
            wrapper = DistributedDataParallel(
                self.module,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=inputs.config.bucket_mb,
                gradient_as_bucket_view=True,
                **_keep_buffers(),
            )
        # DDP compares the hook's annotations with types, ours are strings: a lambda has none.
        hook = lambda group, bucket: self._reduce(group, bucket)  # noqa: E731, PLW0108
        wrapper.register_comm_hook(dist.group.WORLD, hook)
        return wrapper

    def _reduce(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: records the peak, then averages in fp32."""
        if not self._weights.has(bucket):
            self._peaks.look([bucket.buffer()])
            return allreduce_hook(group, bucket)
        buffer, sums = bucket.buffer(), self._weights.fp32_sums(bucket)
        self._peaks.look([sums])
        reduced = dist.all_reduce(sums.div_(self._world.size), group=group, async_op=True)
        return reduced.get_future().then(lambda _: buffer)  # type: ignore[union-attr, no-any-return]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of forward passes."""
        with self._weights.in_use(), self._precision.autocast():
            yield

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces in the last micro-batch only."""
        return nullcontext() if last or self._wrapper is None else self._wrapper.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share."""
        with self._weights.in_use():  # recomputed activations need the same weights
            self._precision.scale(loss * self._world.size).backward()
        self._weights.collect_gradients()

    def step(self, lr: float) -> StepResult:
        """One optimizer step, or none where any rank's gradient is not finite. Waits for the device only where the
        optimizer must (:func:`scaled_step`).
        """
        parameters = list(self.module.parameters())
        if self._divided:
            self._expert_peaks.look(p.grad for p in parameters if is_expert(p) and p.grad is not None)
            reduce_expert_gradients(parameters, self._layout, divide_by=self._world.size)
        norm, divisor = self._norm(parameters), self._precision.loss_scale
        if divisor is not None:
            norm = norm / divisor
        applied = torch.isfinite(norm)
        clean = applied if self._wrapper is None else self._peaks.all_finite(norm.device)
        if self._clip_norm > 0:  # as torch's clip_grads_with_norm_: the factor is clip_norm / (norm + 1e-6), at most 1
            excess = ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        found_inf = applied.logical_not().float()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scaled_step(self._optimizer, divisor, found_inf)
        self._weights.expire()
        self._precision.after_step(found_inf)
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied, clean, self._expert_peaks.all_finite(norm.device))

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """2-norm of the whole model's gradient, 0-dim, the same on all ranks; not finite if any gradient is not."""
        own = [p.grad for p in parameters if p.grad is not None and not (self._divided and is_expert(p))]
        norm = nn.utils.get_total_norm(own) if own else torch.zeros(())
        return (norm.square() + expert_square_sum(parameters, self._layout)).sqrt() if self._divided else norm

    def optimizer_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameter name → Adam's moments and the like."""
        return named_optimizer_tensors(self.module, self._optimizer)

    def load_optimizer_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts back what :meth:`optimizer_tensors` gave."""
        load_named_optimizer_tensors(self.module, self._optimizer, tensors)

    def state(self) -> dict[str, Any]:
        """The loss scale."""
        return {"precision": self._precision.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`state` gave."""
        self._precision.load_state(state.get("precision", {}))
