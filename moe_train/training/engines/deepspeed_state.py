"""Converts the optimizer's state of ZeRO 1 and 2 between DeepSpeed's flat shards and tensors by parameter name.

DeepSpeed lays the parameters of an optimizer group end to end, cuts that into one shard per rank, and steps an fp32
copy of its own shard. ``parameter._hp_mapping`` is a parameter's place in it: a slice of the parameter (``lp``) and a
slice of the shard (``hp``), or None if the shard has nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEP = "step"


@dataclass(frozen=True)
class Shard:
    """This rank's part of an optimizer group.

    Attributes:
        parameters: the group's parameters by name.
        flat: the fp32 copy that is stepped, under which the optimizer keeps its state.
        settings: the optimizer's group.
        group: the ranks that share these parameters.
    """

    parameters: Mapping[str, nn.Parameter]
    flat: Tensor
    settings: Mapping[str, Any]
    group: dist.ProcessGroup


def shards(module: nn.Module, zero: Any) -> Iterator[Shard]:
    """The shards of DeepSpeed's ZeRO optimizer ``zero``, in the order of its groups."""
    names = {id(p): name for name, p in module.named_parameters()}
    for number, parameters in enumerate(zero.bit16_groups):
        named = {names[id(p)]: p for p in parameters}
        flat, group = zero.single_partition_of_fp32_groups[number], zero.real_dp_process_group[number]
        yield Shard(named, flat, zero.optimizer.param_groups[number], group)


def gather_optimizer_tensors(module: nn.Module, zero: Any) -> dict[str, dict[str, Tensor]]:
    """Parameter name → the optimizer's whole tensors for it. Every rank calls it, and gets some of the names.

    The ranks that share parameters take turns, so that each tensor is on one rank and no rank holds the whole
    optimizer. Tensors are in host memory.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for shard in shards(module, zero):
        state = zero.optimizer.state.get(shard.flat, {})
        keys = sorted(k for k, v in state.items() if isinstance(v, Tensor) and v.shape == shard.flat.shape)
        rank, size = dist.get_rank(shard.group), dist.get_world_size(shard.group)
        for number, (name, parameter) in enumerate(shard.parameters.items()):
            owner = number % size
            tensors = {key: _gather(parameter, state[key], shard.group, owner) for key in keys}
            if owner == rank and STEP in state:
                tensors[STEP] = torch.tensor(float(state[STEP]))
            if owner == rank and tensors:
                whole[name] = tensors
    return whole


def _gather(parameter: nn.Parameter, flat: Tensor, group: dist.ProcessGroup, owner: int) -> Tensor:
    """The whole tensor in host memory on group rank ``owner``; the result on other ranks must not be used."""
    whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=parameter.device)
    if (place := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
        _part(whole, place.lp_fragment_address).copy_(_part(flat, place.hp_fragment_address))
    dist.reduce(whole, group=group, group_dst=owner)
    return whole.view(parameter.shape).cpu()


def load_optimizer_tensors(module: nn.Module, zero: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The inverse of :func:`gather_optimizer_tensors`, from whole tensors of all parameters, on every rank.

    The fp32 copies are taken from the parameters, which have just been loaded. A parameter without state in the
    checkpoint (one that never had a gradient) begins with zeros.
    """
    zero.refresh_fp32_params()
    for shard in shards(module, zero):
        known = {name: tensors[name] for name in shard.parameters if name in tensors}
        keys = {key for entry in known.values() for key in entry} - {STEP}
        state: dict[str, Any] = {key: torch.zeros_like(shard.flat, requires_grad=False) for key in sorted(keys)}
        for name, entry in known.items():
            place = shard.parameters[name]._hp_mapping  # type: ignore[attr-defined]
            for key in keys & entry.keys() if place is not None else ():
                source = _part(entry[key].reshape(-1), place.lp_fragment_address)
                _part(state[key], place.hp_fragment_address).copy_(source)
        steps = [float(entry[STEP]) for entry in known.values() if STEP in entry]
        if steps:
            state[STEP] = _step(max(steps), shard, zero.optimizer)
        if state:
            zero.optimizer.state[shard.flat] = state
    zero._hp_optimizer_states_linked = False  # DeepSpeed links them to parameters once; these are others


def _step(value: float, shard: Shard, optimizer: torch.optim.Optimizer) -> int | Tensor:
    """The count of steps in the optimizer's own form: DeepSpeed's CPU Adam counts with an int, torch with a tensor."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value)
    on_device = shard.settings.get("fused") or shard.settings.get("capturable")
    return torch.tensor(value, device=shard.flat.device if on_device else "cpu")


def _part(flat: Tensor, address: Any) -> Tensor:
    return flat.narrow(0, address.start, address.numel)
