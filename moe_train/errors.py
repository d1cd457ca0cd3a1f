"""Errors that speak to the user: what is wrong, where, and what to do about it.

Commands catch :class:`UserError`, print it as one message and leave with exit code 2; anything else is a defect of ours
and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe_train.safe_text import for_terminal

_SPELLINGS = {"k": "top_k"}  # what papers and documents call a key, too far from its name to be found as a near word


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        what: what is wrong, as one sentence without its full stop.
        where: the file, line or config key that it concerns.
        remedy: what to do about it.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        stop = "" if self.remedy.endswith("?") else "."
        advice = f" {self.remedy[0].upper()}{self.remedy[1:].rstrip('.')}{stop}" if self.remedy else ""
        return f"{place}{self.what.rstrip('.')}.{advice}"


class ConfigError(UserError):
    """A config key or value that cannot be."""


class DataError(UserError):
    """A corpus, a text file or a prepared data folder that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, altered, or of another model."""


class LaunchError(UserError):
    """Processes, ports, ranks or layouts that cannot be had."""


class TrainingError(UserError):
    """A run that cannot go on: gradients that stay infinite, a disk that is full."""


class MissingDependency(UserError):
    """A library that this command needs and that is not installed."""


def error_to_json(error: OSError | UserError) -> dict[str, Any]:
    """An error as plain values, for other ranks."""
    if isinstance(error, UserError):
        return {"kind": type(error).__name__, "arguments": [error.what, error.where, error.remedy]}
    return {"kind": "OSError", "arguments": [error.errno, error.strerror or str(error), error.filename]}


def error_from_json(content: Mapping[str, Any]) -> OSError | UserError:
    """The inverse of :func:`error_to_json`; an unknown kind becomes a plain UserError, an OSError its own subclass."""
    kinds: dict[str, type[OSError | UserError]] = {kind.__name__: kind for kind in UserError.__subclasses__()}
    kinds["OSError"] = OSError
    return kinds.get(content["kind"], UserError)(*content["arguments"])


@contextmanager
def located(where: str) -> Iterator[None]:
    """A UserError from inside says that it is about ``where``, in front of what place it names itself."""
    try:
        yield
    except UserError as error:
        if error.where.startswith(where):
            raise
        raise type(error)(error.what, f"{where}: {error.where}" if error.where else where, error.remedy) from error


def note(text: str) -> None:
    """Tells the user, on standard error, what is no error; nothing depends on whether that can be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there
        print(f"note: {for_terminal(text)}", file=sys.stderr, flush=True)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The part of a message that offers near spellings, and every choice where none is near."""
    known = sorted(choices)
    full = spelt_out(word)
    near = [full] if full != word and full in known else difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(known)}"


def spelt_out(word: str) -> str:
    """The name of the key that papers and documents call ``word``: ``top_k`` for ``k``; else the word itself."""
    return _SPELLINGS.get(word, word)


def plural(count: int, noun: str) -> str:
    """Such as ``1 rank`` and ``2,000 ranks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
