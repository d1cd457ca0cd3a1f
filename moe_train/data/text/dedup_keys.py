"""64-bit keys of sentences: for de-duplication, for splits, and for overlap between splits.

Two different sentences share a key with probability 2^-64: about 1e-7 for a pair anywhere in a million sentences.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np


class _FoldTable(dict[int, str]):
    """Character -> itself if it is a letter or a mark, else nothing; filled on demand."""

    def __missing__(self, point: int) -> str:
        character = chr(point)
        self[point] = character if unicodedata.category(character)[0] in "LM" else ""
        return self[point]


_fold_table = cache(_FoldTable)


def fold(text: str) -> str:
    """The letters of a sentence, without case, spacing, punctuation and digits: equal for sentences taken as the same.

    A text without letters is returned as it is.
    """
    return text.casefold().translate(_fold_table()) or text.strip()


def hash64(text: str) -> int:
    """A 64-bit hash that does not depend on machine, process or version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def sentence_key(text: str) -> int:
    """Key of a sentence up to :func:`fold`."""
    return hash64(fold(text))


def line_keys(lines: Sequence[tuple[str, ...]], sides: int) -> np.ndarray:
    """Keys of lines, or of pairs of them: each side's sentence, and the exact text. uint64 [lines, sides + 1]."""
    rows = [(*map(sentence_key, line), hash64("\0".join(line))) for line in lines]
    return np.array(rows, dtype=np.uint64).reshape(len(rows), sides + 1)


def uniform(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Maps keys to numbers in [0, 1) that depend only on key, seed and purpose. float64, same shape."""
    salt = np.uint64(hash64(f"{purpose} {seed}"))
    with np.errstate(over="ignore"):  # splitmix64 relies on wrapping
        x = keys.astype(np.uint64) + salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
