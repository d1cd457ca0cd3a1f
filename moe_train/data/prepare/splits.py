"""Selects the cleaned pairs or lines for training and for held-out sets.

The selection depends only on 64-bit keys and hashes of the sentences, not on their order. So it is the same for any
number of workers, and a sentence is in the same split in all languages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.config.corpus import CorpusConfig
from moe_train.data.prepare.cleaned import CleanedText
from moe_train.data.text.dedup_keys import uniform
from moe_train.data.text.languages import find_english
from moe_train.data.text.pairs import Sides
from moe_train.errors import DataError

Keys = Mapping[str, np.ndarray]
"""Language -> sorted distinct sentence keys."""


@dataclass(frozen=True)
class Selection:
    """The selected pairs or lines of one text.

    Attributes:
        train: bool [lines].
        held_out: split -> bool [lines]; empty for text with a split.
    """

    text: CleanedText
    train: np.ndarray
    held_out: Mapping[str, np.ndarray]


def select(
    texts: Sequence[CleanedText], given: Keys, missing: Mapping[Sides, Sequence[str]], config: CorpusConfig, seed: int
) -> list[Selection]:
    """Removes duplicates, makes the missing held-out sets, and removes their sentences from training.

    Args:
        texts: training text and text without a split.
        given: keys of the user's held-out files.
        missing: pair of a text without a split -> held-out splits to take from it.

    Raises:
        DataError: a split is empty.
    """
    unique = [_without_duplicates(text, config.cleaning.deduplicate) for text in texts]
    held_out = [
        _hold_out(text, keep, missing.get(text.sides, ()), config, seed)
        for text, keep in zip(texts, unique, strict=True)
    ]
    made = union(
        (language, text.keys[rows, column])
        for text, held in zip(texts, held_out, strict=True)
        for rows in held.values()
        for column, language in enumerate(text.sides)
    )
    selections = []
    for text, keep, held in zip(texts, unique, held_out, strict=True):
        train = keep & ~np.any(list(held.values()), axis=0) if held else keep.copy()
        train = _without(text, train, made, "dropped_held_out")
        if config.decontaminate:
            train = _without(text, train, given, "dropped_overlap")
        train = _at_most(text, train, config.max_pairs, seed)
        text.counts["kept"] = int(train.sum())
        selections.append(Selection(text, train, held))
        _check_not_empty(selections[-1])
    return selections


def union(parts: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins keys by language."""
    collected: dict[str, list[np.ndarray]] = defaultdict(list)
    for language, keys in parts:
        collected[language].append(keys)
    return {language: np.unique(np.concatenate(keys)) for language, keys in collected.items()}


def occurs(keys: np.ndarray, sides: Sides, held: Keys) -> np.ndarray:
    """Whether a side of each pair is among the held-out sentences of its language. bool [lines]."""
    found = np.zeros(len(keys), dtype=bool)
    for column, language in enumerate(sides):
        if language in held:
            found |= np.isin(keys[:, column], held[language])
    return found


def _without_duplicates(text: CleanedText, deduplicate: bool) -> np.ndarray:
    keep = np.ones(text.size, dtype=bool)
    if deduplicate:
        keep[:] = False
        keep[np.unique(text.keys[:, -1], return_index=True)[1]] = True
        text.counts["dropped_duplicate"] = int(text.size - keep.sum())
    return keep


def _hold_out(
    text: CleanedText, keep: np.ndarray, splits: Sequence[str], config: CorpusConfig, seed: int
) -> dict[str, np.ndarray]:
    """Held-out rows of a text without a split, chosen by the key of the English side, else of the source, so that the
    same sentence is held out in every language; of several translations the first is used."""
    if not splits:
        return {}
    sides = tuple(text.sides)
    keys = text.keys[:, sides.index(find_english(sides) or sides[0])]
    rows = np.flatnonzero(keep)
    rows = np.sort(rows[np.unique(keys[rows], return_index=True)[1]])
    draws = uniform(keys[rows], seed, "split")
    test, both = config.split.test, config.split.test + config.split.valid
    inside = {"test": draws < test, "valid": (draws >= test) & (draws < both)}
    chosen = {}
    for split in splits:
        candidates = rows[inside[split]][np.argsort(draws[inside[split]], kind="stable")]
        chosen[split] = np.zeros(text.size, dtype=bool)
        chosen[split][candidates[: config.split.max_sentences]] = True
        text.counts[split] = int(chosen[split].sum())
    return chosen


def _without(text: CleanedText, train: np.ndarray, held: Keys, rule: str) -> np.ndarray:
    found = train & occurs(text.keys, text.sides, held)
    text.counts[rule] = int(found.sum())
    return train & ~found


def _at_most(text: CleanedText, train: np.ndarray, limit: int, seed: int) -> np.ndarray:
    rows = np.flatnonzero(train)
    if not limit or len(rows) <= limit:
        return train
    draws = uniform(text.keys[rows, -1], seed, "sample")
    chosen = np.zeros_like(train)
    chosen[rows[np.argsort(draws, kind="stable")[:limit]]] = True
    text.counts["dropped_beyond_max_pairs"] = len(rows) - limit
    return chosen


def _check_not_empty(selection: Selection) -> None:
    text = selection.text
    sizes = {
        "train": int(selection.train.sum()),
        **{split: int(rows.sum()) for split, rows in selection.held_out.items()},
    }
    for split, size in sizes.items():
        if size:
            continue
        dropped = ", ".join(
            f"{rule.removeprefix('dropped_')} {n}"
            for rule, n in text.counts.items()
            if rule.startswith("dropped_") and n
        )
        raise DataError(
            f"the split '{split}' is empty: of {text.counts['read']} {text.sides.unit} {text.size} are left after "
            "cleaning" + (f" (dropped: {dropped})" if dropped else ""),
            text.text.name,
            "add text, relax corpus.cleaning.*, or change corpus.split.*"
            if split != "train"
            else "add text or relax corpus.cleaning.*",
        )
