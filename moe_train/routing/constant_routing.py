"""Routing of strategies without a gate: constant weights and no auxiliary loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.gate import routing_dtype
from moe_train.routing.types import Routing, assignment_from_choices, count_statistics


def constant_routing(x: Tensor, choices: Tensor, num_experts: int, weight: float = 1.0) -> Routing:
    """The routing of x [T, d] to choices [T, k], each with the same constant ``weight``."""
    weights = torch.full_like(choices, weight, dtype=routing_dtype(x))
    statistics = count_statistics(choices, None, num_experts)
    return Routing(
        assignment=assignment_from_choices(choices, weights, load=statistics.load),
        choices=choices,
        kept=torch.ones_like(choices, dtype=torch.bool),
        losses={},
        statistics=statistics,
    )
