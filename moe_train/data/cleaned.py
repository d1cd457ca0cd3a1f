"""Cleaned text on disk while a data folder is being made: lines beside their keys, so that memory stays bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning import clean_block
from moe_train.data.corpora.base import ParallelText
from moe_train.data.lines import read_lines
from moe_train.data.pairs import Pair
from moe_train.data.progress import Advance
from moe_train.data.workers import Workers, blocks

_BLOCK = 5_000


@dataclass(frozen=True)
class CleanedText:
    """The cleaned pairs of one :class:`ParallelText`.

    Attributes:
        text: where they come from.
        prefix: the files are ``prefix.<language>`` and ``prefix.keys``.
        counts: what the rules did; selection adds to it.
        size: number of cleaned pairs.
    """

    text: ParallelText
    prefix: Path
    counts: Counter[str]
    size: int

    @property
    def pair(self) -> Pair:
        """The languages, in the order of the files."""
        return self.text.pair

    @property
    def keys(self) -> np.ndarray:
        """uint64 [size, 3]: source sentence, target sentence, exact pair."""
        return np.fromfile(_sibling(self.prefix, "keys"), dtype=np.uint64).reshape(-1, 3)

    def lines(self, language: str, chosen: Iterable[object] | None = None) -> Iterator[str]:
        """The lines of one side, or those for which ``chosen`` is true."""
        lines = read_lines(_sibling(self.prefix, language))
        return lines if chosen is None else compress(lines, chosen)


def _sibling(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def clean_text(
    text: ParallelText, config: CleaningConfig, folder: Path, workers: Workers, advance: Advance = lambda n: None
) -> CleanedText:
    """Cleans a text into ``folder``.

    Args:
        advance: told the number of pairs read since last time.
    """
    prefix, counts, size = folder / text.name, Counter[str](), 0
    tasks = ((config, text.pair, block) for block in blocks(text.read(), _BLOCK))
    names = [*text.pair, "keys"]
    source, target, keys = (_sibling(prefix, name).open("wb") for name in names)
    with source, target, keys:
        for block in workers.map(clean_block, tasks):
            source.write(block.source.encode())
            target.write(block.target.encode())
            keys.write(block.keys.tobytes())
            counts.update(block.counts)
            size += len(block.keys)
            advance(block.counts["read"])
    return CleanedText(text, prefix, counts, size)
