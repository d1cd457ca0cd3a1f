"""Names of tensors in a checkpoint: independent of ranks and layouts, so that any world can read what another wrote.

``model.<parameter>`` and ``optimizer.<parameter>.<key>``. Stacked expert parameters (tagged ``parameter.expert = True``
and first dimension = the experts of this rank) are taken apart: ``model.<parameter>.@<global id>``. The ids are those
of ``parameter.expert_ids``, or 0, 1, 2 … where a rank holds all experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MODEL, OPTIMIZER, EXPERT = "model.", "optimizer.", ".@"


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name → tensor, each a view of the module's own memory, so that loading into them loads the module."""
    named: dict[str, Tensor] = {}
    for name, tensor in _unique(module).items():
        named.update(_pieces(MODEL + name, tensor.detach(), tensor))
    return named


def count_tensors(module: nn.Module) -> int:
    """Number of tensors that :func:`model_tensors` returns."""
    return sum(len(t) if getattr(t, "expert", False) else 1 for t in _unique(module).values())


def optimizer_tensors(module: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Checkpoint name → tensor, from parameter name → key → tensor (what an engine gives)."""
    parameters = dict(module.named_parameters())
    named: dict[str, Tensor] = {}
    for name, tensors in state.items():
        for key, tensor in tensors.items():
            owner = parameters[name] if tensor.shape == parameters[name].shape else None
            for piece, view in _pieces(f"{OPTIMIZER}{name}", tensor.detach(), owner).items():
                named[f"{piece}.{key}"] = view
    return named


def empty_optimizer_state(module: nn.Module, known: Mapping[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    """Parameter name → key → tensor to load into, for every optimizer tensor that a checkpoint has of ``module``.

    Args:
        known: names and shapes of all tensors of the checkpoint.
    """
    keys = sorted({name.rsplit(".", 1)[1] for name in known if name.startswith(OPTIMIZER)})
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        whole = OPTIMIZER + name
        piece = next(iter(_pieces(whole, parameter.detach(), parameter)))
        for key in keys:
            if f"{piece}.{key}" in known and piece != whole:
                state.setdefault(name, {})[key] = torch.zeros_like(parameter)
            elif f"{whole}.{key}" in known:
                shape = known[f"{whole}.{key}"]
                like = parameter if shape == parameter.shape else torch.zeros(())
                state.setdefault(name, {})[key] = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return state


def whole_names(names: Iterable[str]) -> set[str]:
    """The parameters that names belong to: expert ids taken off."""
    return {name.split(EXPERT, 1)[0] for name in names}


def _unique(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under their first name only."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _pieces(name: str, tensor: Tensor, owner: Tensor | None) -> dict[str, Tensor]:
    """The tensor itself, or one view per expert where its owner is a stack of experts."""
    if owner is None or not getattr(owner, "expert", False):
        return {name: tensor}
    ids = getattr(owner, "expert_ids", range(tensor.shape[0]))
    return {f"{name}{EXPERT}{expert}": tensor[row] for row, expert in enumerate(ids)}
