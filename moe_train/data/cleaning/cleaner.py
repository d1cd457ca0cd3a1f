"""Applies menders and filters to pairs, and counts what each did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning.filters import FILTERS, SWITCHES, Side
from moe_train.data.cleaning.menders import MENDERS
from moe_train.data.cleaning.scripts import codes_of_language
from moe_train.data.keys import pair_keys
from moe_train.data.normalisation import normalise
from moe_train.data.pairs import Pair


@dataclass(frozen=True)
class CleanBlock:
    """A block of cleaned pairs as it travels between processes.

    Attributes:
        source, target: lines, each ended by a line feed.
        keys: uint64 [pairs, 3], see :func:`moe_train.data.keys.pair_keys`.
        counts: ``read``, ``dropped_<filter>`` and ``mended_<mender>``.
    """

    source: str
    target: str
    keys: np.ndarray
    counts: Counter[str]


@dataclass
class Cleaner:
    """Cleans the pairs of one language pair.

    Args:
        config: which rules act.
        pair: decides the expected scripts.
    """

    config: CleaningConfig
    pair: Pair
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._menders = [(n, f) for n, f in MENDERS.items() if self.config.enabled and getattr(self.config, n)]
        self._filters = {n: f for n, f in FILTERS.items() if self._is_on(n)}
        self._expected = [codes_of_language(language) for language in self.pair]

    def _is_on(self, name: str) -> bool:
        if not self.config.enabled:
            return name == "empty"
        return name not in SWITCHES or bool(getattr(self.config, SWITCHES[name]))

    def __call__(self, source: str, target: str) -> tuple[str, str] | None:
        """The mended pair, or None if a filter drops it."""
        self.counts["read"] += 1
        source, target = self._mend(source), self._mend(target)
        sides = (Side.of(source, self._expected[0]), Side.of(target, self._expected[1]))
        for name, keep in self._filters.items():
            if not keep(*sides, self.config):
                self.counts[f"dropped_{name}"] += 1
                return None
        return source, target

    def _mend(self, text: str) -> str:
        # Normalising always acts: a line separator inside a sentence would break the line files that follow.
        text = normalise(text)
        for name, mend in self._menders:
            mended = mend(text)
            if mended != text:
                self.counts[f"mended_{name}"] += 1
                text = normalise(mended)
        return text


def clean_block(block: tuple[CleaningConfig, Pair, Sequence[tuple[str, str]]]) -> CleanBlock:
    """Cleans a block of pairs; runs in a worker process."""
    config, pair, lines = block
    cleaner = Cleaner(config, pair)
    kept = [cleaned for source, target in lines if (cleaned := cleaner(source, target)) is not None]
    return CleanBlock(
        source="".join(f"{source}\n" for source, _ in kept),
        target="".join(f"{target}\n" for _, target in kept),
        keys=pair_keys(kept),
        counts=cleaner.counts,
    )
