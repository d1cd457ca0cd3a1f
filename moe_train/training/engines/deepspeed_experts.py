"""Makes experts that are divided over ranks known to DeepSpeed.

DeepSpeed reduces a parameter over the replicas of its expert, instead of over all ranks, where three things hold: the
parameter is marked (``allreduce``, ``group_name``), its optimizer group is marked (``moe``, ``name``), and the model
has a module of the class ``deepspeed.moe.layer.MoE``. ExpertPool is not one, so during ``deepspeed.initialize`` the
model has a child that is, without parameters and never called.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from moe_train.errors import LaunchError
from moe_train.parallel.gradients import expert_parameters, is_expert
from moe_train.parallel.layout import ExpertLayout

_CHILD = "_deepspeed_experts"


def divided(module: nn.Module, layout: ExpertLayout) -> bool:
    """Whether ranks hold different experts."""
    return layout.plan.expert_parallel > 1 and bool(expert_parameters(module))


@contextmanager
def experts_made_known(module: nn.Module, layout: ExpertLayout) -> Iterator[None]:
    """While entered, DeepSpeed finds the experts of ``module``; their parameters stay marked afterwards.

    Raises:
        LaunchError: DeepSpeed groups other ranks than the layout does.
    """
    if not divided(module, layout):
        yield
        return
    size = layout.plan.expert_parallel
    for parameter in expert_parameters(module).values():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name(size)  # type: ignore[attr-defined]
    module.add_module(_CHILD, _stand_in(size))
    try:
        yield
    finally:
        delattr(module, _CHILD)
    _check_groups(layout)


def experts_apart(optimizer: torch.optim.Optimizer, layout: ExpertLayout) -> None:
    """Takes the experts out of a fresh optimizer's groups into groups of their own, with the same settings."""
    groups = []
    for group in optimizer.param_groups:
        dense = [p for p in group["params"] if not is_expert(p)]
        experts = [p for p in group["params"] if is_expert(p)]
        if dense:
            groups.append({**group, "params": dense})
        if experts:
            name = group_name(layout.plan.expert_parallel)
            groups.append({**group, "params": experts, "moe": True, "name": name})
    optimizer.param_groups[:] = groups


def group_name(expert_parallel: int) -> str:
    """DeepSpeed's name of the groups of a size."""
    return f"ep_size_{expert_parallel}"


def _stand_in(size: int) -> nn.Module:
    groups = importlib.import_module("deepspeed.utils.groups")
    library_layer = importlib.import_module("deepspeed.moe.layer").MoE

    class Experts(library_layer):  # type: ignore[misc, valid-type]
        """An MoE layer with the attributes that DeepSpeed's engine reads."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.ep_size, self.num_experts, self.num_local_experts = size, size, 1
            self.expert_group_name = group_name(size)
            self.enable_expert_tensor_parallelism = False

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Makes DeepSpeed's process groups, once for each size in a process."""
            if self.expert_group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(size)

    return Experts()


def _check_groups(layout: ExpertLayout) -> None:
    groups = importlib.import_module("deepspeed.utils.groups")
    theirs = dist.get_process_group_ranks(
        groups._get_expert_data_parallel_group(group_name(layout.plan.expert_parallel))
    )
    ours = dist.get_process_group_ranks(layout.replica_group) if layout.replica_group is not None else []
    if theirs != ours:
        raise LaunchError(
            f"DeepSpeed takes ranks {theirs} for replicas where this layout has {ours}",
            remedy="choose engine=ddp for this layout",
        )
