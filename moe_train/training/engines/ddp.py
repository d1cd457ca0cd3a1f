"""Engine ``ddp``: torch's DistributedDataParallel; gradients of experts divided over ranks are reduced separately."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_train.kernels.cpu.adam import total_norm
from moe_train.parallel.gradients import LocalNorms, expert_square_sum, ignore_experts_in_ddp, is_expert
from moe_train.parallel.replica_gradients import ReplicaGradients
from moe_train.training.engines.base import (
    EngineInputs,
    StepResult,
    load_named_optimizer_tensors,
    named_optimizer_tensors,
    register_engine,
)
from moe_train.training.optim.one_pass_adam import one_pass_adam
from moe_train.training.optim.optimizer import build_optimizer
from moe_train.training.optim.precision import ComputeWeights, Precision, scaled_step
from moe_train.training.optim.sharded_step import ShardedStep


def _keep_buffers() -> dict[str, Any]:
    """No broadcast of buffers before each forward: routers compute theirs from world sums, the same on every rank."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


@register_engine("ddp")
class DdpEngine:
    """See :class:`moe_train.training.engines.base.Engine`. With one process there is no wrapper.

    The loss is a sum of shares, so gradients are summed over ranks, in DDP's communication hook. If experts are divided
    over ranks, DDP ignores them: backward has given them the gradients of their whole group, and
    :class:`ReplicaGradients` sums them over replicas.

    In bf16 and fp16 the modules compute with 16-bit copies of the parameters (:class:`ComputeWeights`), whose gradients
    are added up over micro-batches and ranks in fp32. On CPUs with matrix units Adam reads the gradients of a single
    micro-batch of one process in 16 bits, and writes the copies (:class:`OnePassAdam`). With ``zero_stage`` 1 each
    parameter is stepped by one of the ranks that share it (:class:`ShardedStep`).
    """

    def __init__(self, inputs: EngineInputs) -> None:
        self.module = inputs.module
        self._world, self._layout = inputs.world, inputs.layout
        self._divided = inputs.layout.plan.expert_parallel > 1
        self._clip_norm = inputs.training.clip_norm
        self._precision = Precision(inputs.training.precision, inputs.world.device)
        sharded = inputs.config.zero_stage > 0 and inputs.world.size > 1
        bucket_bytes = inputs.config.bucket_mb << 20
        self._shards = ShardedStep(inputs.module, inputs.layout, bucket_bytes) if sharded else None
        only = None if self._shards is None else self._shards.own
        self._optimizer = build_optimizer(inputs.module, inputs.training.optimizer, only)
        self._weights = ComputeWeights(inputs.module, self._precision.half)
        self._one_pass = one_pass_adam(self._optimizer, self._weights)
        self._last = False
        self._norms = LocalNorms()
        self._experts = self._over_replicas(bucket_bytes) if self._divided else None
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

    def _over_replicas(self, bucket_bytes: int) -> ReplicaGradients:
        """Buckets in about the order in which backward computes the gradients."""
        group = self._layout.replica_group
        assert group is not None
        experts = [p for p in reversed(list(self.module.parameters())) if is_expert(p)]
        gradients = ReplicaGradients({self._weights.leaf(p): p for p in experts}, group, bucket_bytes)
        self._weights.keep_sums_in(gradients.views)
        return gradients

    def _reduce(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: records the norm, then sums in fp32."""
        buffer = bucket.buffer()
        sums = self._weights.fp32_sums(bucket) if self._weights.has(bucket) else buffer
        self._norms.record([sums])
        reduced = dist.all_reduce(sums, group=group, async_op=True)
        return reduced.get_future().then(lambda _: buffer)  # type: ignore[union-attr, no-any-return]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of forward passes."""
        with self._weights.in_use(), self._precision.autocast():
            yield

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced in the last micro-batch only."""
        self._last = last
        if self._experts is not None:
            self._experts.last = last
        return nullcontext() if last or self._wrapper is None else self._wrapper.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share."""
        with self._weights.in_use():  # recomputed activations need the same weights
            self._precision.scale(loss).backward()
        self._weights.collect_gradients(keep=self._last and self._wrapper is None and self._one_pass is not None)

    def step(self, lr: float) -> StepResult:
        """One optimizer step, or none where any rank's gradient is not finite. Waits for the device only where the
        optimizer must (:func:`scaled_step`).
        """
        parameters = list(self.module.parameters())
        if self._experts is not None:
            self._experts.finish()
        norm, divisor = self._norm(parameters), self._precision.loss_scale
        if divisor is not None:
            norm = norm / divisor
        applied = torch.isfinite(norm)
        clean = applied if self._wrapper is None else self._norms.all_finite(norm.device)
        if self._clip_norm > 0:  # as torch's clip_grads_with_norm_: the factor is clip_norm / (norm + 1e-6), at most 1
            excess = ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        found_inf = applied.logical_not().float()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._one_pass is None:
            scaled_step(self._optimizer, divisor, found_inf)
            self._weights.expire()
        else:
            self._one_pass.step(divisor, found_inf)
        if self._shards is not None:
            self._shards.exchange()
            self._weights.expire()
        self._precision.after_step(found_inf)
        self.module.zero_grad(set_to_none=True)
        self._weights.clear_gradients()
        experts_clean = clean if self._experts is None else self._experts.norms.all_finite(norm.device)
        return StepResult(norm, applied, clean, experts_clean)

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """2-norm of the whole model's gradient, 0-dim, the same on all ranks; not finite if any gradient is not."""
        leaves = [self._weights.gradient(p) for p in parameters if not (self._divided and is_expert(p))]
        own = [gradient for gradient in leaves if gradient is not None]
        if self._one_pass is not None and own:
            norm = total_norm([gradient.contiguous() for gradient in own])
        else:
            norm = nn.utils.get_total_norm(own) if own else torch.zeros(())
        return (norm.square() + expert_square_sum(parameters, self._layout)).sqrt() if self._divided else norm

    def optimizer_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameter name → Adam's moments and the like, of the parameters that this rank steps."""
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
