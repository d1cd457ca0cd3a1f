"""Unicode normalisation, the same for training text, held-out text and what a user types.

The rules are compiled into ``spm.model``, so that every tool that encodes with it normalises in the same way: canonical
composition (NFC), any kind of space or line break becomes a space, invisible control characters are removed. Unlike
SentencePiece's default NFKC this keeps full-width punctuation, which Chinese and Japanese references contain.
"""

from __future__ import annotations

import unicodedata
from functools import cache

# Joiners (U+200C, U+200D) are kept: Persian and Indic scripts use them.
_INVISIBLE = "\u00ad\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff"
_INVISIBLE += "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
# The planes in which characters are assigned: scripts and symbols, then tags.
_ASSIGNED = (*range(0x33480), *range(0xE0000, 0xE0200))
_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85"


@cache
def character_table() -> dict[int, str]:
    """``str.translate`` table: other spaces to a space, invisible characters to nothing."""
    table: dict[int, str] = {}
    for point in _ASSIGNED:
        category = unicodedata.category(chr(point))
        if category in ("Zs", "Zl", "Zp") and point != 0x20:
            table[point] = " "
        elif category == "Cc":
            table[point] = ""
    table.update({ord(c): "" for c in _INVISIBLE})
    table.update({ord(c): " " for c in _SPACES})
    return table


def normalise(text: str) -> str:
    """NFC, single spaces, without control characters and without spaces at either end."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFC", text.translate(character_table())).split())


@cache
def rules() -> str:
    """The same normalisation as a SentencePiece rule file (hexadecimal code points, tab separated)."""
    table: dict[tuple[int, ...], tuple[int, ...]] = {
        (point,): tuple(map(ord, new)) for point, new in character_table().items() if point
    }
    for point in _ASSIGNED:
        table.update(_composition(chr(point)))
    return "".join(f"{_hexadecimal(old)}\t{_hexadecimal(new)}\n" for old, new in sorted(table.items()))


def _composition(character: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Rules that compose this character, or replace it where NFC has another form of it.

    Without Hangul syllables: text has them composed already, and there are eleven thousand of them.
    """
    point = ord(character)
    if 0xAC00 <= point <= 0xD7A3 or unicodedata.category(character) == "Cs":
        return {}
    composed = unicodedata.normalize("NFC", character)
    if composed != character:
        return {(point,): tuple(map(ord, composed))}
    parts = unicodedata.normalize("NFD", character)
    partial = unicodedata.decomposition(character)
    if len(parts) < 2 or partial.startswith("<"):
        return {}
    step = tuple(int(p, 16) for p in partial.split())
    return {tuple(map(ord, parts)): (point,), step: (point,)}


def _hexadecimal(points: tuple[int, ...]) -> str:
    return " ".join(f"{p:X}" for p in points)
