"""Text that comes from files or other programs, made safe for the place where it is shown: one function a place.

A run's name, a note, a failure or a translation may hold escape sequences, markup or a formula. A terminal would carry
out the first, a page the second, and a spreadsheet the third.
"""

from __future__ import annotations

import html
import logging
import re
import traceback

# Control characters but for line feed and tab; what ends lines elsewhere; what turns the direction of text around.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# What begins emphasis, code, links, HTML and cells anywhere; headings, lists, rules and fences at the beginning.
_MARKDOWN = re.compile(r"[\\`*<>\[\]|]|(?<!\w)_|_(?!\w)|^#(?=[#\s])|^[+-](?=\s)|^-(?=--)|^~(?=~~)")
_FORMULA = ("=", "+", "-", "@", "\t")


def for_terminal(text: str) -> str:
    """For terminals and log files: control characters become pictures of themselves (``␛``), lines and tabs stay."""
    return _CONTROLS.sub(_picture, text)


def for_markdown(text: str) -> str:
    """For a paragraph or a table's cell of a Markdown page: one line, in which nothing is markup or HTML."""
    line = " ".join(for_terminal(text).split("\n"))
    return _MARKDOWN.sub(r"\\\g<0>", line).replace("&", "&amp;")


def for_html(text: str) -> str:
    """For the text or an attribute of an HTML page."""
    return html.escape(for_terminal(text))


def for_csv(value: object) -> object:
    """For a cell of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if isinstance(value, (int, float)):
        return value
    text = for_terminal(str(value))
    return f"'{text}" if text.startswith(_FORMULA) else text


class LogFormatter(logging.Formatter):
    """A formatter for log files, which are read on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, its traceback included."""
        return for_terminal(super().format(record))


def show_warnings_as_text() -> None:
    """From here on Python's logging formats so what it prints where there is no log file."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LogFormatter())


def current_traceback() -> str:
    """The traceback of the error that is being handled, for a terminal."""
    return for_terminal(traceback.format_exc())


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
