"""Normalizers (text -> text) remove what a translation model should not learn to generate."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

# Only formatting: a text that mentions <meta> or <input> needs these words.
_HTML_TAGS = frozenset(
    """a abbr acronym b bdi bdo big blockquote br center cite code dd del dfn div dl dt em font h1 h2 h3 h4 h5 h6 hr i
    ins kbd li mark ol p pre q s samp small span strike strong sub sup table tbody td tfoot th thead tr tt u ul
    var wbr""".split()  # noqa: SIM905
)
_BLOCK_TAGS = frozenset(
    "br p li div tr td th dt dd ul ol hr h1 h2 h3 h4 h5 h6 table section article".split()  # noqa: SIM905
)
_TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]*)((?:\s[^<>]*)?)/?>")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

# Chinese, Japanese and Korean menus append the key: ファイル(&F), 文件(_F)
_APPENDED_KEY = re.compile(r"\s*[(（][&_][A-Za-z0-9][)）]")
_KEY = {"&": re.compile(r"(?<![&\w])&(?=[^\W\d_])"), "_": re.compile(r"(?:^|(?<=[\s\"'(\[]))_(?=[^\W\d_])")}
_KEY_INSIDE = {"&": re.compile(r"(?<=[^\W\d_])&(?=[^\W\d_])"), "_": re.compile(r"(?<=[^\W\d_])_(?=[^\W\d_])")}
_MENU_WORDS = 3
_LOOKS_TECHNICAL = re.compile(r"=|//|%\(|\{")


def strip_markup(text: str) -> str:
    """Removes HTML tags and other tags that the text also closes, and resolves character entities."""
    if "<" in text:
        closed = {match[2] for match in _TAG.finditer(text) if match[1]}

        def replace(match: re.Match[str]) -> str:
            name = match[2]
            if name.lower() not in _HTML_TAGS and name not in closed:
                return match[0]  # such as <file> in a usage message
            return " " if name.lower() in _BLOCK_TAGS else ""

        text = _TAG.sub(replace, text)
    return html.unescape(text) if "&" in text and _ENTITY.search(text) else text


def strip_accelerators(text: str) -> str:
    """Removes the mark of a menu's keyboard accelerator: ``&File``, ``Save _As``, ``E&xit``, ``文件(&F)``.

    A mark inside a word is removed only in a short, menu-like text: ``AT&T``, ``a=1&b=2``, ``max_updates`` are kept.
    """
    if "&" not in text and "_" not in text:
        return text
    text = _APPENDED_KEY.sub("", text)
    for mark in "&_":
        if text.count(mark) == 1 and not _LOOKS_TECHNICAL.search(text):
            text = _strip_mark(text, mark)
    return text


def _strip_mark(text: str, mark: str) -> str:
    match = _KEY[mark].search(text)
    inside = _KEY_INSIDE[mark].search(text)
    menu = len(text.split()) <= _MENU_WORDS and text[0].isupper()
    if match is None and inside is not None and menu and text[inside.end()].islower():  # not R&D, Drag&Drop
        match = inside
    letter = text[match.end()] if match else ""
    if match is None or letter.lower() == letter.upper():  # uncased scripts append their keys
        return text
    return text[: match.start()] + text[match.end() :]


NORMALIZERS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"markup": strip_markup, "accelerators": strip_accelerators}
)
"""In the order of their application; each name is also the key of CleaningConfig that switches it."""
