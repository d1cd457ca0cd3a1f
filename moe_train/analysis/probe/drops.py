"""Tokens that experts leave out: by capacity (token choice), or because no expert takes them (expert choice).

A token is *dropped* where none of its choices is carried out: its residual is all that goes on. This is the paper's
count (Puigcerver et al., 2024, appendix B), not that of (token, expert) pairs, which train.jsonl has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drops:
    """Counts over tokens.

    Attributes:
        tokens: T.
        dropped: tokens that no expert works on.
        partly: tokens that lost some choices and not all.
        experts_per_token: [k + 1] tokens by the number of experts that work on them.
    """

    tokens: int
    dropped: int
    partly: int
    experts_per_token: tuple[int, ...]

    @property
    def dropped_fraction(self) -> float:
        """``dropped`` over all tokens; 0 where there are none."""
        return self.dropped / self.tokens if self.tokens else 0.0


def count_drops(choices: Tensor, kept: Tensor) -> Drops:
    """Of a router's choices [T, k] (-1: none) and kept [T, k].

    With expert choice ``choices`` has only what experts took, so ``partly`` is 0 and tokens without a choice are the
    dropped ones.
    """
    asked = choices >= 0
    carried = (asked & kept).sum(1)
    partly = (carried > 0) & (carried < asked.sum(1))
    histogram = torch.bincount(carried, minlength=choices.shape[1] + 1)
    return Drops(
        tokens=choices.shape[0],
        dropped=int((carried == 0).sum()),
        partly=int(partly.sum()),
        experts_per_token=tuple(int(n) for n in histogram),
    )
