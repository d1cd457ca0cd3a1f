"""The optimizer and its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import nn

from moe_train.config import OptimizerConfig
from moe_train.config.training import Decay

Groups = list[dict[str, object]]
_BUILDERS: dict[str, Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]] = {}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, only: Container[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of ``model``, in the groups of :func:`parameter_groups`.

    Args:
        only: parameters to take; a group may then be empty. None: all.
    """
    groups = parameter_groups(model, config.weight_decay, config.decay)
    if only is not None:
        groups = [{**group, "params": [p for p in group["params"] if p in only]} for group in groups]  # type: ignore[attr-defined]
    return _BUILDERS[config.name](groups, config)


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay = "matrices") -> Groups:
    """Two groups, with and without weight decay; an empty one is left out.

    A parameter's boolean attribute ``decays`` decides. Of parameters without it, matrices decay, and vectors (biases,
    norms, scales) only if ``decay`` is ``all``.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        decays = getattr(parameter, "decays", decay == "all" or _is_matrix(parameter))
        (decayed if decays else spared).append(parameter)
    groups: Groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Expert parameters are stacked, so their first dimension does not count: [E, h] is a stack of biases."""
    return parameter.dim() - bool(getattr(parameter, "expert", False)) >= 2


def _fused(groups: Groups) -> bool:
    """Whether torch's fused kernels, the fastest, take these parameters: floating-point ones on CPU and CUDA."""
    tensors = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    return all(t.device.type in ("cpu", "cuda") and t.is_floating_point() for t in tensors)


def _adam(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    first, second = config.betas
    return torch.optim.Adam(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=_fused(groups))


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=_fused(groups))


def _sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


_BUILDERS.update(adam=_adam, adamw=_adamw, sgd=_sgd)
