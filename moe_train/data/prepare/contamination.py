"""Counts the sentences of the user's held-out files that also occur in training text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.data.corpora.base import CorpusText, listing
from moe_train.data.prepare.splits import Keys, Selection, union
from moe_train.data.text.dedup_keys import line_keys
from moe_train.errors import DataError

Report = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class HeldOut:
    """A held-out file or file pair of the user.

    Attributes:
        lines: (source, target) or (line,), raw.
        keys: uint64 [sentences, sides + 1].
    """

    text: CorpusText
    lines: list[tuple[str, ...]]
    keys: np.ndarray

    @classmethod
    def read(cls, text: CorpusText) -> HeldOut:
        """Reads the text.

        Raises:
            DataError: it has no lines, or a side of each is blank.
        """
        lines = list(text.read())
        found = cls(text, lines, line_keys(lines, len(tuple(text.sides))))
        if not any(found.has_text):
            what = f"the split '{text.split}' of {text.sides.name} is empty"
            if lines:
                what += f": of its {len(lines):,} {text.sides.unit} none has text on every side"
            raise DataError(
                what, str(text.inputs[0]) if text.inputs else text.name, "add lines with text, or remove its files"
            )
        return found

    @property
    def has_text(self) -> np.ndarray:
        """Lines in which no side is blank. bool [sentences]."""
        return np.array([all(side.strip() for side in line) for line in self.lines])


def blank_note(sets: Sequence[HeldOut]) -> str:
    """A note on blank lines, which are kept; "" where there are none."""
    counts = {held.text.name: (int((~held.has_text).sum()), held) for held in sets}
    found = [
        f"{n:,} of {len(held.lines):,} {held.text.sides.unit} of {name}" for name, (n, held) in counts.items() if n
    ]
    return f"note: held-out text that is blank or has a blank side is kept: {listing(found)}" if found else ""


def held_out_keys(sets: Sequence[HeldOut]) -> Keys:
    """Keys of all their sentences, by language."""
    return union((language, s.keys[s.has_text, column]) for s in sets for column, language in enumerate(s.text.sides))


def count_overlap(sets: Sequence[HeldOut], selections: Sequence[Selection], keys: Keys) -> Report:
    """Counts held-out sentences that occur in the selected training text of the same language.

    Sentences are equal if their letters are (:func:`moe_train.data.text.dedup_keys.fold`).

    Returns:
        split -> pair -> {"sentences": n, <language>: how many of them occur in training}.
    """
    found = union(
        (language, np.intersect1d(selection.text.keys[selection.train, column], keys[language]))
        for selection in selections
        for column, language in enumerate(selection.text.sides)
        if language in keys
    )
    report: Report = {}
    for held in sets:
        counts = {"sentences": len(held.lines)}
        for column, language in enumerate(held.text.sides):
            inside = np.isin(held.keys[:, column], found.get(language, np.empty(0, np.uint64))) & held.has_text
            counts[language] = int(inside.sum())
        report.setdefault(held.text.split or "", {})[held.text.sides.name] = counts
    return report
