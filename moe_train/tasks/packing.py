"""Sentences of a file packed into blocks, as FULL-SENTENCES of RoBERTa (Liu et al., 2019, §4.2) and XLM-R's text.

A block is a range of the file: whole sentences in the file's order, each with its end, as many as fit. Blocks are the
same in every epoch, on every rank and after a resume; their order is drawn by seed and epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_train.fairseq_compat import apply
from moe_train.tasks.indexed_dataset import Indices, SentenceFile

# A sentence longer than a block is cut into parts of 1/8 of a block, so that less than a part stays unfilled.
_PARTS = 8

# Offset of the numbers of blocks that begin inside a sentence; no split has that number of sentences.
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
        """A number for each block, that of its first sentence; no two blocks of a file have the same."""
        numbers: Indices = self._numbers[blocks]
        return numbers

    def fill(self, table: NDArray[np.int64], rows: Indices, blocks: Indices, column: int = 0) -> None:
        """Writes ``blocks`` into ``rows`` of ``table`` [B, L], left-aligned at ``column``."""
        self.file.copy(table, rows, self._starts[blocks], self.sizes[blocks], column)


def pack(sizes: Indices, room: int) -> tuple[Indices, Indices, Indices]:
    """The ranges of a file that are its blocks.

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
    # fairseq's "complete" mode: as many whole consecutive elements as fit. [N, 2] first token, last + 1.
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
