"""Cleaned text on disk while a data folder is made: lines and their keys, so that memory is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning import clean_block
from moe_train.data.corpora.base import CorpusText
from moe_train.data.stage_progress import Advance
from moe_train.data.text.lines import read_lines
from moe_train.data.text.pairs import Sides
from moe_train.utils.process_map import Workers, blocks

_BLOCK = 5_000


@dataclass(frozen=True)
class CleanedText:
    """The cleaned lines of one :class:`CorpusText`.

    Attributes:
        text: their source.
        prefix: the files are ``prefix.<language>`` and ``prefix.keys``.
        counts: lines read, dropped and changed by each rule; :func:`select` adds to it.
        size: number of cleaned pairs or lines.
    """

    text: CorpusText
    prefix: Path
    counts: Counter[str]
    size: int

    @property
    def sides(self) -> Sides:
        """The languages, in the order of the files."""
        return self.text.sides

    @property
    def keys(self) -> np.ndarray:
        """uint64 [size, sides + 1]: key of each side's sentence, and of the exact text of all sides."""
        return np.fromfile(_sibling(self.prefix, "keys"), dtype=np.uint64).reshape(
            self.size, len(tuple(self.sides)) + 1
        )

    def lines(self, language: str, chosen: Iterable[object] | None = None) -> Iterator[str]:
        """The lines of one side, or those for which ``chosen`` is true."""
        lines = read_lines(_sibling(self.prefix, language))
        return lines if chosen is None else compress(lines, chosen)


def _sibling(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def clean_text(
    text: CorpusText, config: CleaningConfig, folder: Path, workers: Workers, advance: Advance = lambda n: None
) -> CleanedText:
    """Cleans a text into ``folder``.

    Args:
        advance: called with the number of pairs or lines read since the last call.
    """
    prefix, counts, size = folder / text.name, Counter[str](), 0
    tasks = ((config, text.sides, block) for block in blocks(text.read(), _BLOCK, lambda line: sum(map(len, line))))
    names = [*text.sides, "keys"]
    with ExitStack() as stack:
        *files, keys = (stack.enter_context(_sibling(prefix, name).open("wb")) for name in names)
        for block in workers.map(clean_block, tasks):
            for file, side in zip(files, block.sides, strict=True):
                file.write(side.encode())
            keys.write(block.keys.tobytes())
            counts.update(block.counts)
            size += len(block.keys)
            advance(block.counts["read"])
    return CleanedText(text, prefix, counts, size)
