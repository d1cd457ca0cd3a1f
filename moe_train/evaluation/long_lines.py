"""Lines that are longer than the model's longest source: messages that name them, and division at sentence ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from moe_train.errors import plural

_NAMED = 10  # lines that a message names
# The end of a sentence with closing marks: before a space, or anywhere in scripts without spaces.
_CLOSING = "\"'»”’)\\]」』）"
_END = re.compile(rf"[.!?…؟۔।॥։።៕။།]+[{_CLOSING}]*\s+|[。！？｡]+[{_CLOSING}]*\s*")
_NO_SPACE = re.compile(rf"[。！？｡][{_CLOSING}]*$")


def name_lines(lines: Sequence[int]) -> str:
    """Such as ``line 3``, ``lines 3 and 7``, ``lines 1, 2, 3 … (120 in all)``.

    Args:
        lines: numbers from 1, at least one.
    """
    numbers = [f"{line:,}" for line in lines]
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    if len(numbers) > _NAMED:
        return f"lines {', '.join(numbers[:_NAMED])} … ({len(numbers):,} in all)"
    return f"lines {', '.join(numbers[:-1])} and {numbers[-1]}"


def cut_note(lines: Sequence[int], longest: int) -> str:
    """A note that these lines (numbered from 1) were truncated, which their translations do not show."""
    return f"{name_lines(lines)}: cut to the model's {plural(longest, 'token')}, tag and end included"


def sentence_parts(line: str, fits: Callable[[str], bool]) -> list[str]:
    """Divides a line at sentence ends into parts as long as possible; a sentence that does not fit is one part.

    Args:
        fits: whether a text is short enough.
    """
    ends = [match.end() for match in _END.finditer(line)]
    parts: list[str] = []
    for start, end in zip([0, *ends], [*ends, len(line)], strict=True):
        sentence = line[start:end]
        if parts and fits(parts[-1] + sentence):
            parts[-1] += sentence
        elif sentence.strip():
            parts.append(sentence)
    return [part.strip() for part in parts]


def join_parts(parts: Sequence[str]) -> str:
    """Translations of the parts of a line as one line; no space after the full stop of a script without spaces."""
    text = ""
    for part in filter(None, parts):
        space = "" if not text or _NO_SPACE.search(text) else " "
        text += space + part
    return text
