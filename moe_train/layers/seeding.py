"""Initial weights that depend on the seed and on where a module stands, not on what was built before it.

A rank that holds fewer experts draws fewer numbers for them; were all modules drawn from one stream, everything built
later would differ between layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *where: int) -> Iterator[None]:
    """Inside, torch's CPU generator is a function of (seed, where); afterwards it is as it was before."""
    state = seed & ((1 << 63) - 1)
    for part in where:
        # One step of a 64-bit linear congruential generator (Knuth's multiplier) per coordinate.
        state = ((state ^ (part + 1)) * 6364136223846793005 + 1442695040888963407) & ((1 << 63) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(state)
        yield
