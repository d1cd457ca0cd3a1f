"""Uniform numbers that are a function of (seed, update, item), so that a resumed run and any rank draw the same."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moe_train.routing.counter_rng import combine, hash_numbers, uniform_from

# Streams: what one thing draws, nothing else does.
AUGMENTATION, MASKED, REPLACEMENT, PIECE = range(7001, 7005)


def draws(seed: int, update: int, uids: NDArray[np.int64], width: int, stream: int) -> NDArray[np.float64]:
    """[B, width] in [0, 1) for the items ``uids`` [B]; column c is the same whatever the width."""
    state = combine(torch.full((len(uids),), hash_numbers(seed, update, stream)), torch.from_numpy(uids))
    return uniform_from(combine(state.unsqueeze(1), torch.arange(width))).numpy()
