"""Counts dropped tokens: over capacity (token choice), or chosen by no expert (expert choice).

A token is *dropped* where no expert processes it, so that only its residual remains. This is the count of Puigcerver et
al., 2024, appendix B, not that of (token, expert) pairs in train.jsonl.
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
        dropped: tokens that no expert processes.
        partly: tokens with some choices dropped, but not all.
        experts_per_token: [k + 1] tokens by the number of experts that process them.
    """

    tokens: int
    dropped: int
    partly: int
    experts_per_token: tuple[int, ...]

    @property
    def dropped_fraction(self) -> float:
        """``dropped`` over all tokens; 0 without tokens."""
        return self.dropped / self.tokens if self.tokens else 0.0


def count_drops(choices: Tensor, kept: Tensor) -> Drops:
    """Counts drops from a router's choices [T, k] (-1: none) and kept [T, k].

    With expert choice ``choices`` has only choices of experts, so ``partly`` is 0, and tokens without a choice are
    dropped.
    """
    chosen = choices >= 0
    processed = (chosen & kept).sum(1)
    partly = (processed > 0) & (processed < chosen.sum(1))
    histogram = torch.bincount(processed, minlength=choices.shape[1] + 1)
    return Drops(
        tokens=choices.shape[0],
        dropped=int((processed == 0).sum()),
        partly=int(partly.sum()),
        experts_per_token=tuple(int(n) for n in histogram),
    )
