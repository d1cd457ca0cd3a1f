"""One side of a pair of files, read from fairseq's memory-mapped format without a Python object per sentence."""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_train.data.text.lines import reading
from moe_train.errors import DataError

Indices = NDArray[np.int64]

# The index of fairseq's MMapIndexedDataset: magic, version, code of the type, number of sentences N; then N sizes of 32
# and N byte offsets of 64 bits.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")
_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2", 9: "u4", 10: "u8"}
_CHUNK = 1 << 18  # sentences whose entries of the index are checked together; a larger index stays a map
_REMEDY = "the data folder is damaged: restore it, or run moe-prepare again with overwrite=true"


class SentenceFile:
    """The sentences of ``prefix.bin`` and ``prefix.idx``: pieces and an end each.

    Sentences are contiguous in the file, so a batch is one gather from a flat array.

    Args:
        entries: size of the dictionary; larger ids are refused when they are read (None: none are).

    Raises:
        DataError: a file cannot be read, the index is damaged, or it does not fit the ``.bin``.
    """

    def __init__(self, prefix: Path, entries: int | None = None) -> None:
        self.prefix, self.entries = prefix, entries
        self._index, self._data = (prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("idx", "bin"))
        self._sizes, self._offsets, self._dtype = self._read_index()

    @cached_property
    def sizes(self) -> Indices:
        """[N] tokens of each sentence, the end included; 8 bytes each, kept once they have been asked for."""
        return self._sizes.astype(np.int64)

    def sizes_of(self, sentences: slice | Indices) -> Indices:
        """Tokens of some sentences, read from the memory-mapped index, which processes of a host share."""
        return self._sizes[sentences].astype(np.int64)

    def _read_index(self) -> tuple[NDArray[np.int32], Indices, np.dtype[np.integer]]:
        with reading(self._index):
            if self._index.stat().st_size < _HEADER.size:
                raise self._wrong(f"the index ends within its header of {_HEADER.size} bytes")
            content = np.asarray(np.memmap(self._index, np.uint8, mode="r"))
        magic, version, code, count = _HEADER.unpack(content[: _HEADER.size].tobytes())
        if count <= _CHUNK:  # a map keeps its file open, and there may be hundreds of small ones
            content = content.copy()
        if magic != _MAGIC or version != 1 or code not in _TYPES:
            raise self._wrong("this is no index of fairseq's mmap format with whole numbers")
        expected = _HEADER.size + count * 12
        if len(content) != expected:
            raise self._wrong(f"an index of {count:,} sentences has {expected:,} bytes, this has {len(content):,}")
        middle = _HEADER.size + count * 4
        sizes, offsets = content[_HEADER.size : middle].view(np.int32), content[middle:].view(np.int64)
        dtype: np.dtype[np.integer] = np.dtype(_TYPES[code])
        end = 0
        for first in range(0, count, _CHUNK):
            some = sizes[first : first + _CHUNK].astype(np.int64)
            if some.min() < 1:
                number = int(some.argmin())
                size = some[number]
                raise self._wrong(
                    f"the sentence {first + number} has a size of {size} tokens: each has an end at least"
                )
            ends = end + np.cumsum(some) * dtype.itemsize
            if not np.array_equal(offsets[first : first + _CHUNK], ends - some * dtype.itemsize):
                raise self._wrong("sentences do not lie one behind the other: the offsets are not those of the sizes")
            end = int(ends[-1])
        with reading(self._data):
            found = self._data.stat().st_size
        if found != end:
            raise self._wrong(f"the index is of {end:,} bytes, {self._data.name} has {found:,}")
        return sizes, offsets, dtype

    def _wrong(self, what: str) -> DataError:
        return DataError(what, str(self._index), _REMEDY)

    def __len__(self) -> int:
        return len(self._sizes)

    def _starts(self, sentences: Indices) -> Indices:
        """Where sentences start, in tokens from the file's start."""
        return self._offsets[sentences] // self._dtype.itemsize

    @cached_property
    def _tokens(self) -> NDArray[np.integer]:
        if not len(self):  # an empty file cannot be mapped
            return np.empty(0, self._dtype)
        with reading(self._data):
            return np.memmap(self._data, dtype=self._dtype, mode="r")

    def sentence(self, number: int) -> NDArray[np.int64]:
        """[length] dictionary ids, the end included."""
        start = self._offsets[number] // self._dtype.itemsize
        return self._checked(self._tokens[start : start + self._sizes[number]])

    def fill(self, table: NDArray[np.int64], rows: Indices, sentences: Indices, column: int = 0) -> None:
        """Writes ``sentences`` into ``rows`` of ``table`` [B, L], left-aligned at ``column``."""
        self.copy(table, rows, self._starts(sentences), self.sizes_of(sentences), column)

    def numbers(self, sentences: Indices) -> Indices:
        """A number for each sentence: its own."""
        return sentences

    def copy(self, table: NDArray[np.int64], rows: Indices, starts: Indices, sizes: Indices, column: int) -> None:
        """Writes stretches of the file, ``sizes`` [B] tokens from ``starts`` [B], into ``rows`` of ``table`` [B, L]."""
        ends = np.cumsum(sizes)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        tokens = self._checked(self._tokens[np.repeat(starts, sizes) + within])
        table[np.repeat(rows, sizes), column + within] = tokens

    def _checked(self, tokens: NDArray[np.integer]) -> Indices:
        """The tokens, checked to be entries of the dictionary.

        Raises:
            DataError: one is not.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if self.entries is not None and len(ids) and not 0 <= ids.min() <= ids.max() < self.entries:
            wrong = ids[(ids < 0) | (ids >= self.entries)][0]
            what = f"the token id {wrong} is none of the dictionary's {self.entries:,} entries"
            raise DataError(what, str(self._data), _REMEDY)
        return ids
