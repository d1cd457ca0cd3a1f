"""Filters decide whether a pair or a single line is kept. Each gets the normalized sides with their letter counts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning import scripts
from moe_train.data.cleaning.placeholders import placeholders, without_placeholders
from moe_train.data.text.dedup_keys import fold


@dataclass(frozen=True)
class Side:
    """One side of a pair, or a single line.

    Attributes:
        text: the whole text.
        words: the text without placeholders.
        codes: script codes of the letters of ``words``.
        expected: script codes of the language (empty: any).
    """

    text: str
    words: str
    codes: str
    expected: str

    @classmethod
    def of(cls, text: str, expected: str) -> Side:
        """Counts the letters of a text."""
        words = without_placeholders(text)
        return cls(text, words, scripts.script_codes(words), expected)


def _unicode(sides: Sequence[Side], config: CleaningConfig) -> bool:
    """No replacement characters, private use or unassigned code points, which come from wrong encodings."""
    return not any(_is_broken(side.text) for side in sides)


def _is_broken(text: str) -> bool:
    return not text.isascii() and (
        "\ufffd" in text or any(unicodedata.category(c) in ("Co", "Cn", "Cs") for c in set(text))
    )


def _empty(sides: Sequence[Side], config: CleaningConfig) -> bool:
    return all(side.text for side in sides)


def _length(sides: Sequence[Side], config: CleaningConfig) -> bool:
    return all(config.min_words <= scripts.count_words(side.text, side.codes) <= config.max_words for side in sides)


def _ratio(sides: Sequence[Side], config: CleaningConfig) -> bool:
    # The constant allows larger ratios for short messages.
    lengths = [scripts.weighted_length(side.text, side.codes) + 8 for side in sides]
    return max(lengths) <= config.max_ratio * min(lengths)


def _letters(sides: Sequence[Side], config: CleaningConfig) -> bool:
    return all(
        len(side.codes) >= max(1.0, config.letter_share * (len(side.words) - side.words.count(" "))) for side in sides
    )


def _untranslated(sides: Sequence[Side], config: CleaningConfig) -> bool:
    # fold() is slow, and equal sentences have the same number of letters.
    source, target = sides
    return len(source.codes) != len(target.codes) or fold(source.text) != fold(target.text)


def _placeholders(sides: Sequence[Side], config: CleaningConfig) -> bool:
    source, target = sides
    if source.words == source.text and target.words == target.text:
        return True
    return placeholders(source.text) == placeholders(target.text)


def _script(sides: Sequence[Side], config: CleaningConfig) -> bool:
    return all(_in_script(side, config.script_share) for side in sides)


def _in_script(side: Side, share: float) -> bool:
    if not side.expected or not side.codes:
        return True
    found = set(side.codes)
    if found <= set(side.expected):
        return True
    every = scripts.weighted_letters(side.codes, "".join(found))
    return scripts.weighted_letters(side.codes, side.expected) >= share * every


Filter = Callable[[Sequence[Side], CleaningConfig], bool]

FILTERS: Mapping[str, Filter] = MappingProxyType(
    {
        "empty": _empty,
        "unicode": _unicode,
        "length": _length,
        "ratio": _ratio,
        "letters": _letters,
        "untranslated": _untranslated,
        "placeholders": _placeholders,
        "script": _script,
    }
)
"""In the order of their application; the first that drops a line is counted."""

SWITCHES: Mapping[str, str] = MappingProxyType(
    {"untranslated": "untranslated", "placeholders": "placeholders", "script": "script"}
)
"""Filter -> key of CleaningConfig that switches it."""

COMPARING = frozenset(("ratio", "untranslated", "placeholders"))
"""Filters that compare two sides, for pairs only."""
