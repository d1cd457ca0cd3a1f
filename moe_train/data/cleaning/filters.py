"""Filters: does a pair stay? Each sees the two mended sides and what has been counted in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moe_train.config.corpus import CleaningConfig
from moe_train.data.cleaning import scripts
from moe_train.data.cleaning.placeholders import placeholders, without_placeholders
from moe_train.data.keys import fold


@dataclass(frozen=True)
class Side:
    """One side of a pair.

    Attributes:
        text: the whole of it.
        words: the text without its placeholders.
        codes: script codes of the words' letters.
        expected: the codes that the language may have (empty: any).
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


def _unicode(source: Side, target: Side, config: CleaningConfig) -> bool:
    """No replacement characters, private use or unassigned code points: traces of broken encodings."""
    return not any(_is_broken(side.text) for side in (source, target))


def _is_broken(text: str) -> bool:
    return not text.isascii() and (
        "\ufffd" in text or any(unicodedata.category(c) in ("Co", "Cn", "Cs") for c in set(text))
    )


def _empty(source: Side, target: Side, config: CleaningConfig) -> bool:
    return bool(source.text) and bool(target.text)


def _length(source: Side, target: Side, config: CleaningConfig) -> bool:
    return all(
        config.min_words <= scripts.count_words(side.text, side.codes) <= config.max_words for side in (source, target)
    )


def _ratio(source: Side, target: Side, config: CleaningConfig) -> bool:
    # The constant forgives short messages, where ratios mean little.
    lengths = [scripts.weighted_length(side.text, side.codes) + 8 for side in (source, target)]
    return max(lengths) <= config.max_ratio * min(lengths)


def _letters(source: Side, target: Side, config: CleaningConfig) -> bool:
    return all(
        len(side.codes) >= max(1.0, config.letter_share * (len(side.words) - side.words.count(" ")))
        for side in (source, target)
    )


def _untranslated(source: Side, target: Side, config: CleaningConfig) -> bool:
    # Folding is slow, and equal sentences have equally many letters.
    return len(source.codes) != len(target.codes) or fold(source.text) != fold(target.text)


def _placeholders(source: Side, target: Side, config: CleaningConfig) -> bool:
    if source.words == source.text and target.words == target.text:
        return True
    return placeholders(source.text) == placeholders(target.text)


def _script(source: Side, target: Side, config: CleaningConfig) -> bool:
    return all(_in_script(side, config.script_share) for side in (source, target))


def _in_script(side: Side, share: float) -> bool:
    if not side.expected or not side.codes:
        return True
    found = set(side.codes)
    if found <= set(side.expected):
        return True
    every = scripts.weighted_letters(side.codes, "".join(found))
    return scripts.weighted_letters(side.codes, side.expected) >= share * every


Filter = Callable[[Side, Side, CleaningConfig], bool]

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
"""In the order in which they are asked; the first that says no is the one that is counted."""

SWITCHES: Mapping[str, str] = MappingProxyType(
    {"untranslated": "untranslated", "placeholders": "placeholders", "script": "script"}
)
"""Filters that CleaningConfig can turn off by a key."""
