"""Placeholders of messages, which a program fills in at run time."""

from __future__ import annotations

import re
from collections import Counter

_PLACEHOLDER = re.compile(
    r"%\((?P<named>[\w.]+)\)[-#0+]*\d*(?:\.\d+)?[diouxXeEfFgGcrsa]"
    r"|%(?:\d+\$)?[-#0+]*\d*(?:\.\d+)?(?:hh|ll|[hlLqjzt])?(?P<printf>[diouxXeEfFgGcrsa@])(?![A-Za-z])"
    r"|%(?P<numbered>\d)(?!\d|\s*%|[.,]\d)"
    r"|\$\{(?P<shell>[\w.]+)\}"
    r"|\{\{?\s*(?P<brace>[\w.\[\]!:]*)\s*\}\}?"
)


def placeholders(text: str) -> Counter[str]:
    """The placeholders of a message: ``%(name)s``, ``%1$s`` or ``%s``, ``{name}``, ``${name}``, ``%1``."""
    if not may_have_placeholders(text):
        return Counter()
    return Counter(f"{match.lastgroup}:{match[match.lastgroup or 0]}" for match in _PLACEHOLDER.finditer(text))


def without_placeholders(text: str) -> str:
    """The text without placeholders."""
    return _PLACEHOLDER.sub(" ", text) if may_have_placeholders(text) else text


def may_have_placeholders(text: str) -> bool:
    """A fast check; False where there is certainly no placeholder."""
    return "%" in text or "{" in text
