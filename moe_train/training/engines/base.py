"""The interface of engines, and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from moe_train.config import EngineConfig, TrainingConfig
from moe_train.errors import ConfigError, did_you_mean
from moe_train.models.trainable import TrainableModel
from moe_train.parallel.layout import ExpertLayout
from moe_train.training.runtime.world import World


@dataclass(frozen=True)
class StepOutcome:
    """Result of an optimizer step.

    Attributes:
        grad_norm: 2-norm of the whole world's gradient before clipping; not finite where the step was skipped.
        applied: whether the parameters were changed; the same on all ranks.
        clean: whether this rank's own gradient was finite before it was reduced.
        experts_clean: the same for experts that are divided over ranks, which ``clean`` leaves out: their gradients
            come from tokens of other ranks, too.
    """

    grad_norm: float
    applied: bool
    clean: bool
    experts_clean: bool = True


@dataclass(frozen=True)
class StepResult:
    """A :class:`StepOutcome` on the device, as 0-dim tensors, so that nothing waits for the device."""

    grad_norm: Tensor
    applied: Tensor
    clean: Tensor
    experts_clean: Tensor

    @classmethod
    def of(cls, outcome: StepOutcome, device: torch.device) -> StepResult:
        """From numbers of the host."""
        return cls(*(torch.full((), value, device=device) for value in dataclasses.astuple(outcome)))

    def read(self) -> StepOutcome:
        """Waits for the device."""
        values = (self.grad_norm, self.applied, self.clean, self.experts_clean)
        norm, *flags = torch.stack([value.double() for value in values]).tolist()
        return StepOutcome(norm, *map(bool, flags))


class Engine(Protocol):
    """Owns the optimizer, the precision and the reduction of gradients over ranks.

    Attributes:
        module: the bare model, by whose parameter names state is kept.
        model: called for forward passes; ``module`` or a wrapper around it.
    """

    module: TrainableModel
    model: nn.Module

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch; gradients are reduced in the ``last`` one of an update only."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's share of the loss; the sum over ranks is what the update descends."""

    def step(self, lr: float) -> StepResult:
        """Clips, steps where all ranks' gradients are finite, and clears the gradients."""

    def optimizer_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameter name → the optimizer's tensors for it."""

    def load_optimizer_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`optimizer_tensors`."""

    def state(self) -> dict[str, Any]:
        """Further state to keep, as plain numbers."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""


@dataclass(frozen=True)
class EngineInputs:
    """What an engine is built from.

    Attributes:
        layout: which rank holds which experts. Parameters of experts are tagged ``parameter.expert = True`` and carry
            ``parameter.expert_ids``, the global ids of their rows; every other parameter is the same on all ranks.
            ``alone``: every rank holds all experts.
    """

    module: TrainableModel
    config: EngineConfig
    training: TrainingConfig
    world: World
    layout: ExpertLayout = field(default_factory=ExpertLayout.local)


B = TypeVar("B", bound=Callable[[EngineInputs], Engine])
_ENGINES: dict[str, Callable[[EngineInputs], Engine]] = {}


def register_engine(name: str) -> Callable[[B], B]:
    """Makes ``engine.name=name`` build the decorated class.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(builder: B) -> B:
        if name in _ENGINES:
            raise ValueError(f"the engine {name!r} is registered twice")
        _ENGINES[name] = builder
        return builder

    return decorate


def build_engine(inputs: EngineInputs) -> Engine:
    """The engine that the config names.

    Raises:
        ConfigError: there is none.
    """
    name = inputs.config.name
    if name not in _ENGINES:
        raise ConfigError(f"there is no engine '{name}'", remedy=did_you_mean(name, _ENGINES))
    return _ENGINES[name](inputs)


def named_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameter name → the optimizer's tensors for it; parameters that were never stepped are left out."""
    return {
        name: {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        for name, p in module.named_parameters()
        if p in optimizer.state
    }


def load_named_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The inverse of :func:`named_optimizer_tensors`; the optimizer converts types and devices."""
    names = {id(p): name for name, p in module.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: dict(tensors[names[id(p)]]) for i, p in enumerate(ordered) if names[id(p)] in tensors}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
