"""Uniform numbers as a function of (seed, update, item): the same after a resume, on any rank."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moe_train.routing.counter_rng import combine, hash_numbers, uniform_from

# Streams of numbers, one per use.
AUGMENTATION, MASKED, REPLACEMENT, PIECE = range(7001, 7005)


def draws(seed: int, update: int, uids: NDArray[np.int64], width: int, stream: int) -> NDArray[np.float64]:
    """[B, width] in [0, 1) for the items ``uids`` [B]; column c does not depend on the width."""
    state = combine(torch.full((len(uids),), hash_numbers(seed, update, stream)), torch.from_numpy(uids))
    return uniform_from(combine(state.unsqueeze(1), torch.arange(width))).numpy()
