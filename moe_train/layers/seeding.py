"""Initial weights that depend on the seed and on a module's position, not on the modules built before it.

A rank with fewer experts draws fewer random numbers; with a single stream, all modules built later would differ between
layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, *where: int) -> Iterator[None]:
    """Context in which torch's CPU generator is seeded by (seed, where); the state before is restored at its end."""
    state = seed & ((1 << 63) - 1)
    for part in where:
        # One step of a 64-bit linear congruential generator (Knuth's multiplier) per coordinate.
        state = ((state ^ (part + 1)) * 6364136223846793005 + 1442695040888963407) & ((1 << 63) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(state)
        yield
