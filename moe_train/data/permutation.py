"""A random permutation of any size that is computed position by position and takes no memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 4
_CHUNK = 1 << 16  # positions computed together: intermediate values stay in the processor's cache


class Permutation:
    """A bijection of 0 … size - 1, determined by ``key``.

    A Feistel network of four double rounds permutes the 2^b numbers of the fewest bits b that hold ``size``; a result
    beyond ``size`` is put in again until it is inside (cycle walking: Black and Rogaway, CT-RSA 2002), fewer than two
    times on average.

    Args:
        key: whole numbers, such as (seed, use, epoch).
    """

    def __init__(self, size: int, *key: int) -> None:
        bits = max(2, (size - 1).bit_length())
        self._size, self._low_bits = np.uint64(size), np.uint64(bits // 2)
        self._low = np.uint64((1 << (bits // 2)) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)

    def __call__(self, positions: Indices) -> Indices:
        """What stands at ``positions`` [N], all of 0 … size - 1."""
        result = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), _CHUNK):
            values = self._mixed(positions[start : start + _CHUNK].astype(np.uint64))
            while len(outside := np.flatnonzero(values >= self._size)):
                values[outside] = self._mixed(values[outside])
            result[start : start + _CHUNK] = values
        return result

    def _mixed(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values & self._low, values >> self._low_bits
        for even, odd in self._keys.reshape(_ROUNDS, 2):
            low = low ^ (_hash(high + even) & self._low)
            high = high ^ (_hash(low + odd) & self._high)
        return (high << self._low_bits) | low


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
