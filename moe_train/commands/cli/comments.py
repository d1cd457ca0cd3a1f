"""Reads the comments of a config file: on the file, and on each key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KEY = re.compile(r"(?P<indent> *)(?P<item>- )?(?P<key>\w+):(?= |$)(?P<rest>.*)")
_COMMENT = re.compile(r"""^(?P<before>(?:[^#'"]|(?<=\S)#|'[^']*'|"[^"]*")*?)(?P<sign>#)(?: (?P<text>.*))?$""")


@dataclass(frozen=True)
class ConfigComments:
    """The comments of a file.

    Attributes:
        paragraphs: of the head of the file, lines joined; one that starts with spaces is a line of an example.
        keys: dotted name → its comment: after the key, continued below in the same column, or in lines above it.
            Entries of the list ``defaults`` are keys, too: ``defaults.model``.
        is_global: whether names of keys are absolute (Hydra's ``@package _global_``).
    """

    paragraphs: tuple[str, ...]
    keys: dict[str, str]
    is_global: bool

    @property
    def examples(self) -> list[str]:
        """Example commands, with the comments after them."""
        return [text.strip() for text in self.paragraphs if text.startswith(" ")]

    @property
    def prose(self) -> list[str]:
        """The other paragraphs."""
        return [text for text in self.paragraphs if not text.startswith(" ")]


def read_comments(path: Path) -> ConfigComments:
    """Reads a file of ``configs/``: two spaces per level, one key per line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    size = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = [line.removeprefix("#").removeprefix(" ") for line in lines[:size]]
    is_global = "@package _global_" in head
    body = _paragraphs([line for line in head if not line.startswith("@package")])
    return ConfigComments(tuple(body), _key_comments(lines[size:]), is_global)


def _paragraphs(lines: Sequence[str]) -> list[str]:
    found = [""]
    for line in lines:
        if not line or line.startswith(" ") or found[-1].startswith(" "):
            found.append(line)
        else:
            found[-1] = f"{found[-1]} {line}".strip()
    return [text for text in found if text.strip()]


def _key_comments(lines: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # indents and names of the keys above the present line
    above, last, column = "", "", -1  # comment lines before a key, the last key, and the column of its comment
    for line in lines:
        comment = _COMMENT.match(line)
        text = (comment["text"] or "") if comment else ""
        if comment and not comment["before"].strip():
            if comment.start("sign") == column:
                found[last] += f" {text}"
            else:
                above, column = f"{above} {text}".strip(), -1
            continue
        key = _KEY.match(comment["before"] if comment else line)
        if not key:
            above, column = "", -1
            continue
        indent = len(key["indent"]) + len(key["item"] or "")
        parents = [(width, name) for width, name in parents if width < indent] + [(indent, key["key"])]
        last = ".".join(name for _, name in parents)
        if text or above:
            found[last] = text or above
        above, column = "", comment.start("sign") if comment else -1
    return found
