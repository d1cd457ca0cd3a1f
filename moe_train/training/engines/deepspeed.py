"""DeepSpeed: ZeRO stages 0, 1 and 2, with the same results as torch's DistributedDataParallel.

ZeRO 1 keeps a shard of the optimizer's state on each rank, ZeRO 2 of the reduced gradients as well (Rajbhandari et al.,
2020, arXiv:1910.02054). Experts that are divided over ranks are reduced over their replicas. Micro-batches,
precision, schedule and checkpoints stay those of the training loop; the checkpoint format does not depend on shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.config import OptimizerConfig
from moe_train.errors import LaunchError
from moe_train.parallel.gradients import gradient_norm, is_expert
from moe_train.training.engines.base import (
    EngineInputs,
    StepOutcome,
    StepResult,
    load_named_optimizer_tensors,
    named_optimizer_tensors,
    register_engine,
)
from moe_train.training.engines.deepspeed_experts import divided, experts_apart, experts_made_known
from moe_train.training.engines.deepspeed_library import deepspeed_config, import_deepspeed
from moe_train.training.engines.deepspeed_state import gather_optimizer_tensors, load_optimizer_tensors
from moe_train.training.optim.optimizer import build_optimizer, parameter_groups
from moe_train.training.optim.precision import Precision


class GradientWatch:
    """Largest absolute value of each gradient as this rank computed it; once reduced, a NaN is on every rank."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._peaks: list[Tensor] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._peaks.append(torch.linalg.vector_norm(gradient.detach(), float("inf")))

    def all_finite(self) -> bool:
        """Whether all gradients since the last call were finite."""
        peaks, self._peaks = self._peaks, []
        return not peaks or bool(torch.isfinite(torch.stack(peaks)).all())


@register_engine("deepspeed")
class DeepSpeedEngine:
    """See :class:`moe_train.training.engines.base.Engine`.

    DeepSpeed divides every gradient by the number of ranks, of experts too, while the loss is a sum of shares, so
    :meth:`backward` multiplies by their number.

    Raises:
        MissingDependency: DeepSpeed is not installed.
        LaunchError: there is no process group (DeepSpeed needs one even for one process).
    """

    def __init__(self, inputs: EngineInputs) -> None:
        if not dist.is_initialized():
            raise LaunchError("engine=deepspeed needs torch.distributed", remedy="start with moe-train or torchrun")
        self.module = inputs.module
        self._world, self._layout = inputs.world, inputs.layout
        self._clip_norm = inputs.training.clip_norm
        self._sharded = inputs.config.zero_stage > 0
        self._precision = Precision(inputs.training.precision, inputs.world.device)
        self._engine, self._optimizer = _initialise(inputs)
        apart = divided(self.module, self._layout)
        known = list(self.module.parameters())
        self._watch = GradientWatch(p for p in known if not (apart and is_expert(p)))
        self._expert_watch = GradientWatch(p for p in known if apart and is_expert(p))
        self.model: nn.Module = self._engine

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return self._precision.autocast()

    @contextmanager
    def _micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """ZeRO 2 reduces every micro-batch, the others the last one only."""
        return self._micro_batch(last)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share."""
        self._engine.backward(loss * self._world.size)

    def step(self, lr: float) -> StepResult:
        """One optimizer step, or none where any rank's gradient is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        clean, experts_clean = self._watch.all_finite(), self._expert_watch.all_finite()
        norm, applied = self._sharded_step() if self._sharded else self._whole_step()
        return StepResult.of(StepOutcome(norm, applied, clean, experts_clean), self._world.device)

    def _sharded_step(self) -> tuple[float, bool]:
        """ZeRO 1 and 2 take the norm over all shards, clip by it, and skip on all ranks where it is not finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())

    def _whole_step(self) -> tuple[float, bool]:
        """Stage 0: DeepSpeed reduces and steps; norm and clipping are computed here."""
        parameters = list(self.module.parameters())
        norm = gradient_norm(parameters, self._layout)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._clip_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
            self._engine.step()
        else:
            self._optimizer.zero_grad(set_to_none=True)
        return float(norm), finite

    def optimizer_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameter name → Adam's moments and so on, whole; under ZeRO each on one of the ranks that share it."""
        if self._sharded:
            return gather_optimizer_tensors(self.module, self._engine.optimizer)
        return named_optimizer_tensors(self.module, self._optimizer)

    def load_optimizer_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts back what any engine's :meth:`optimizer_tensors` gave, and takes over the parameters as they stand."""
        if self._sharded:
            load_optimizer_tensors(self.module, self._engine.optimizer, tensors)
        else:
            load_named_optimizer_tensors(self.module, self._optimizer, tensors)

    def state(self) -> dict[str, Any]:
        """Nothing: there is no loss scale."""
        return {"precision": self._precision.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self._precision.load_state(state.get("precision", {}))


def _initialise(inputs: EngineInputs) -> tuple[Any, torch.optim.Optimizer]:
    """DeepSpeed's engine around the module, and the optimizer that it steps."""
    library = import_deepspeed(inputs.world.device)
    os.environ.setdefault("LOCAL_RANK", str(inputs.world.local_rank))
    offload = inputs.config.offload_optimizer
    optimizer = (_cpu_adam if offload else build_optimizer)(inputs.module, inputs.training.optimizer)
    if divided(inputs.module, inputs.layout):
        experts_apart(optimizer, inputs.layout)
    with experts_made_known(inputs.module, inputs.layout), numbers_apart(inputs.module):
        engine, *_ = library.initialize(
            model=inputs.module, optimizer=optimizer, config=deepspeed_config(inputs.config, inputs.training)
        )
    return engine, optimizer


@contextmanager
def numbers_apart(module: nn.Module) -> Iterator[None]:
    """While entered, DeepSpeed leaves parameters without a dimension (a temperature, a scale) as they are.

    DeepSpeed 0.19 broadcasts parameters as bytes, which torch refuses for a 0-dim tensor: rank 0's values are broadcast
    here. ``ds_optim_param`` is DeepSpeed's mark of parameters that are not broadcast.
    """
    numbers = [parameter for parameter in module.parameters() if parameter.dim() == 0]
    for number in numbers:
        number.ds_optim_param = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for number in numbers:
            del number.ds_optim_param  # type: ignore[attr-defined]
            dist.broadcast(number.data, src=0)


def _cpu_adam(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for shards that live on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = parameter_groups(module, config.weight_decay, config.decay)
    betas, decoupled = tuple(config.betas), config.name == "adamw"
    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
        groups, lr=config.lr, betas=betas, eps=config.eps, adamw_mode=decoupled
    )
    return optimizer
