"""Escapes text from files or other programs for terminals, Markdown, HTML and CSV.

A run's name, a note, a failure or a translation may contain escape sequences, markup or formulas, which a terminal, a
page or a spreadsheet would execute.
"""

from __future__ import annotations

import html
import logging
import re
import traceback
import unicodedata

# Control characters except line feed and tab; Unicode line separators; characters that change the text direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Markdown for emphasis, code, links, HTML and cells anywhere; headings, lists, rules and fences at the start of a line.
_MARKDOWN = re.compile(r"[\\`*<>\[\]|]|(?<!\w)_|_(?!\w)|^#(?=[#\s])|^[+-](?=\s)|^-(?=--)|^~(?=~~)")
_FORMULA = ("=", "+", "-", "@")
_FIRST = re.compile("[\\s\u200b-\u200d\u2060\ufeff]*(.?)", re.DOTALL)  # the first visible character


def for_terminal(text: str) -> str:
    """For terminals and log files: replaces control characters by symbols (``␛``), except line feeds and tabs."""
    return _CONTROLS.sub(_symbol, text)


def for_markdown(text: str) -> str:
    """For a paragraph or table cell of a Markdown page: one line with markup and HTML escaped."""
    line = " ".join(for_terminal(text).split("\n"))
    return _MARKDOWN.sub(r"\\\g<0>", line).replace("&", "&amp;")


def for_html(text: str) -> str:
    """For the text or an attribute of an HTML page."""
    return html.escape(for_terminal(text))


def for_csv(value: object) -> object:
    """For a cell of a CSV file: text that a spreadsheet would read as a formula is prefixed with an apostrophe."""
    if isinstance(value, (int, float)):
        return value
    text = for_terminal(str(value))
    found = _FIRST.match(text)
    first = unicodedata.normalize("NFKC", found[1]) if found else ""  # of a full-width "=" it is "="
    return f"'{text}" if text.startswith("\t") or first.startswith(_FORMULA) else text


class LogFormatter(logging.Formatter):
    """A formatter for log files, which are displayed on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record with its traceback, escaped."""
        return for_terminal(super().format(record))


def show_warnings_as_text() -> None:
    """Makes Python's logging escape what it prints if there is no log file."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LogFormatter())


def current_traceback() -> str:
    """The traceback of the current exception, escaped for a terminal."""
    return for_terminal(traceback.format_exc())


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
