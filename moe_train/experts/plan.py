"""Pairs (token, expert, weight) laid out in expert order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """Where each of P pairs stands when pairs are sorted by expert (stably, so that the order never varies).

    Attributes:
        order: [P] int64, pair that stands in each row.
        token: [P] int64, token of each row.
        counts: rows of each local expert, on the host.
    """

    order: Tensor
    token: Tensor
    counts: tuple[int, ...]


def plan_rows(token: Tensor, expert: Tensor, num_experts: int) -> RowPlan:
    """Sorts pairs by expert. token [P], expert [P] (local ids). One host sync, for the counts."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    return RowPlan(order, token[order], tuple(counts.tolist()))
