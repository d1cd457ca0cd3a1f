"""Dropout with a quarter of torch's cost for random numbers on the CPU, a tenth of a small model's training time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DRAWS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zeroes elements of x with probability p and scales the others by 1 / (1 - p); returns x outside training.

    On the CPU each 64-bit number of torch's default generator is used for four elements, so p is rounded to a multiple
    of 2^-16, and the scale uses the rounded p, so that the expectation is x. Elsewhere this is torch's dropout.
    """
    if not p or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * _DRAWS), _DRAWS)
    if dropped == _DRAWS:
        return x * 0.0
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    drop = (draws[: x.numel()] < dropped - _DRAWS // 2).view(x.shape)
    return torch.where(drop, torch.zeros((), dtype=x.dtype), x * (_DRAWS / (_DRAWS - dropped)))
