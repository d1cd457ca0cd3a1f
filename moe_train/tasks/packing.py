"""Sentences of a file packed into blocks, as FULL-SENTENCES of RoBERTa (Liu et al., 2019, §4.2) and XLM-R's text.

A block is a stretch of the file: whole sentences in the file's order, each with its end, as many as fit. Nothing is
drawn, so that blocks are the same in every epoch, on every rank and after a resume; the batches draw, by seed and
epoch, which block comes when.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_train.fairseq_compat import apply
from moe_train.tasks.indexed_dataset import Indices, SentenceFile

# A sentence longer than a block is cut into parts of this share of one: a block is then filled up to less than a part.
_PARTS = 8

# Blocks that begin inside a sentence are numbered apart from sentences, of which no split has this many.
_INSIDE = 1 << 40


class PackedFile:
    """A :class:`SentenceFile` as blocks of up to ``room`` tokens, ends included; read as the file itself is.

    Attributes:
        sizes: [N] tokens of each block.
    """

    def __init__(self, file: SentenceFile, room: int) -> None:
        self.file = file
        self._starts, self.sizes, self._numbers = pack(file.sizes, room)

    def __len__(self) -> int:
        return len(self.sizes)

    def numbers(self, blocks: Indices) -> Indices:
        """A number for each block, its first sentence's: a sentence alone has the number it always has.

        No two blocks of a file share one.
        """
        numbers: Indices = self._numbers[blocks]
        return numbers

    def fill(self, table: NDArray[np.int64], rows: Indices, blocks: Indices, column: int = 0) -> None:
        """Writes ``blocks`` into ``rows`` of ``table`` [B, L], left-aligned at ``column``."""
        self.file.copy(table, rows, self._starts[blocks], self.sizes[blocks], column)


def pack(sizes: Indices, room: int) -> tuple[Indices, Indices, Indices]:
    """Which stretches of a file are its blocks.

    Args:
        sizes: [S] tokens of each sentence, at least 1.
        room: tokens of a block; longer sentences are cut.

    Returns:
        starts [N] (tokens before the block), sizes [N] and numbers [N] (see :meth:`PackedFile.numbers`).
    """
    apply()
    from fairseq.data.token_block_utils_fast import _get_slice_indices_fast

    if not len(sizes):
        return sizes, sizes, sizes
    sentences, parts, lengths = _cut(sizes, room)
    # fairseq's "complete" mode: as many whole elements, one behind the other, as fit. [N, 2] first token, last + 1.
    edges = np.asarray(_get_slice_indices_fast(lengths, "complete", room, 0), np.int64)
    first = np.searchsorted(np.cumsum(lengths) - lengths, edges[:, 0])
    return edges[:, 0], edges[:, 1] - edges[:, 0], sentences[first] + _INSIDE * parts[first]


def _cut(sizes: Indices, room: int) -> tuple[Indices, Indices, Indices]:
    """Sentences longer than a block in parts: sentence, number of the part and tokens, all [parts]."""
    longest = np.where(sizes > room, max(1, room // _PARTS), room)
    counts = -(-sizes // longest)
    sentences = np.repeat(np.arange(len(sizes)), counts)
    parts = np.arange(len(sentences)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.minimum(longest[sentences], sizes[sentences] - parts * longest[sentences])
    return sentences, parts, lengths
