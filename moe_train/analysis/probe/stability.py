"""Stability of routing between checkpoints of a run, and between runs (X-MoE, Chi et al., 2022, §4.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fluctuation_ratio(before: Tensor, after: Tensor) -> float:
    """Share of tokens whose first expert differs between two checkpoints on the same input.

    Args:
        before, after: [T] expert ids (first choices, before drops).

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"choices of {tuple(before.shape)} and {tuple(after.shape)} tokens cannot be compared")
    if before.numel() == 0:
        return 0.0
    return float((before != after).double().mean())


def inter_run_consistency(loads: Sequence[Tensor]) -> float:
    """``IC = (1/m²) Σ_ij Pearson(l_i, l_j)`` over m runs' load vectors l = [n_1 .. n_E].

    The diagonal is included, as in the paper, so that unrelated runs give about 1/m and identical ones 1. The
    correlation with a load vector without variance (perfectly balanced) is taken as 0.
    """
    stacked = torch.stack([load.to(torch.float64) for load in loads])
    centred = stacked - stacked.mean(1, keepdim=True)
    norms = centred.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, centred / norms.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    pearson = unit @ unit.T
    pearson.fill_diagonal_(1.0)
    return float(pearson.mean())
