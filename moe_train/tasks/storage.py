"""One side of a pair of files, read from fairseq's memory-mapped format without a Python object per sentence."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_train.fairseq_compat import apply

Indices = NDArray[np.int64]


class SentenceFile:
    """The sentences of ``prefix.bin`` and ``prefix.idx``: pieces and an end each.

    Sentences lie one behind the other in the file, so a batch is one gather from a flat array.
    """

    def __init__(self, prefix: Path) -> None:
        apply()
        from fairseq.data.indexed_dataset import MMapIndexedDataset

        index = MMapIndexedDataset.Index(f"{prefix}.idx")
        self.prefix = prefix
        self.sizes: Indices = np.array(index.sizes, dtype=np.int64)
        self._dtype = index.dtype

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def _starts(self) -> Indices:
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def _tokens(self) -> NDArray[np.integer]:
        if not self.sizes.sum():  # an empty file cannot be mapped
            return np.empty(0, self._dtype)
        return np.memmap(f"{self.prefix}.bin", dtype=self._dtype, mode="r")

    def sentence(self, number: int) -> NDArray[np.int64]:
        """[length] dictionary ids, the end included."""
        start = self._starts[number]
        return np.asarray(self._tokens[start : start + self.sizes[number]], dtype=np.int64)

    def fill(self, table: NDArray[np.int64], rows: Indices, sentences: Indices, column: int = 0) -> None:
        """Writes ``sentences`` into ``rows`` of ``table`` [B, L], left-aligned at ``column``."""
        self.copy(table, rows, self._starts[sentences], self.sizes[sentences], column)

    def numbers(self, sentences: Indices) -> Indices:
        """A number for each sentence: its own."""
        return sentences

    def copy(self, table: NDArray[np.int64], rows: Indices, starts: Indices, sizes: Indices, column: int) -> None:
        """Writes stretches of the file, ``sizes`` [B] tokens from ``starts`` [B], into ``rows`` of ``table`` [B, L]."""
        ends = np.cumsum(sizes)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        tokens = self._tokens[np.repeat(starts, sizes) + within]
        table[np.repeat(rows, sizes), column + within] = tokens
