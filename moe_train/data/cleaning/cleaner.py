"""Applies normalizers and filters to pairs and single lines, and counts the changes of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning.filters import COMPARING, FILTERS, SWITCHES, Side
from moe_train.data.cleaning.normalizers import NORMALIZERS
from moe_train.data.cleaning.scripts import codes_of_language
from moe_train.data.text.dedup_keys import line_keys
from moe_train.data.text.normalisation import normalise
from moe_train.data.text.pairs import Sides


@dataclass(frozen=True)
class CleanBlock:
    """A block of cleaned pairs or lines, returned by a worker process.

    Attributes:
        sides: the lines of each side, each ended by a line feed.
        keys: uint64 [lines, sides + 1], see :func:`moe_train.data.text.dedup_keys.line_keys`.
        counts: ``read``, ``dropped_<filter>`` and ``mended_<normalizer>``.
    """

    sides: tuple[str, ...]
    keys: np.ndarray
    counts: Counter[str]


@dataclass
class Cleaner:
    """Cleans the pairs of one language pair, or the lines of one language.

    Args:
        config: the rules to apply.
        sides: the languages; they determine the expected scripts, and whether rules that compare two sides apply.
    """

    config: CleaningConfig
    sides: Sides
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._normalizers = [(n, f) for n, f in NORMALIZERS.items() if self.config.enabled and getattr(self.config, n)]
        self._expected = [codes_of_language(language) for language in self.sides]
        self._filters = {n: f for n, f in FILTERS.items() if self._is_on(n)}

    def _is_on(self, name: str) -> bool:
        if not self.config.enabled:
            return name == "empty"
        if name in COMPARING and len(self._expected) == 1:
            return False
        return name not in SWITCHES or bool(getattr(self.config, SWITCHES[name]))

    def __call__(self, *line: str) -> tuple[str, ...] | None:
        """The normalized sides of a line, or None if a filter drops it."""
        self.counts["read"] += 1
        normalized = tuple(map(self._normalize, line))
        sides = [Side.of(text, expected) for text, expected in zip(normalized, self._expected, strict=True)]
        for name, keep in self._filters.items():
            if not keep(sides, self.config):
                self.counts[f"dropped_{name}"] += 1
                return None
        return normalized

    def _normalize(self, text: str) -> str:
        # Always applied: a line separator inside a sentence would break the files of lines that are written.
        text = normalise(text)
        for name, normalizer in self._normalizers:
            changed = normalizer(text)
            if changed != text:
                self.counts[f"mended_{name}"] += 1
                text = normalise(changed)
        return text


def clean_block(block: tuple[CleaningConfig, Sides, Sequence[tuple[str, ...]]]) -> CleanBlock:
    """Cleans a block of pairs or lines; runs in a worker process."""
    config, sides, lines = block
    cleaner = Cleaner(config, sides)
    kept = [cleaned for line in lines if (cleaned := cleaner(*line)) is not None]
    count = len(tuple(sides))
    return CleanBlock(
        sides=tuple("".join(f"{line[side]}\n" for line in kept) for side in range(count)),
        keys=line_keys(kept, count),
        counts=cleaner.counts,
    )
