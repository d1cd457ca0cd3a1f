"""User errors: what is wrong, where, and the remedy.

Commands catch :class:`UserError`, print it as one message and exit with code 2. Any other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe_train.safe_text import for_terminal

_SPELLINGS = {"k": "top_k"}  # names of keys in papers that are too different to be found as similar words


class UserError(Exception):
    """An error that the user can correct.

    Args:
        what: what is wrong, one sentence without full stop.
        where: the file, line or config key.
        remedy: what to do.
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
    """An invalid config key or value."""


class DataError(UserError):
    """An unusable corpus, text file or prepared data folder."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, modified, or of another model."""


class LaunchError(UserError):
    """Processes, ports, ranks or layouts that are not available."""


class TrainingError(UserError):
    """A run that cannot continue: gradients stay infinite, the disk is full."""


class MissingDependency(UserError):
    """A required library that is not installed."""


def error_to_json(error: OSError | UserError) -> dict[str, Any]:
    """An error as JSON values, to send it to other ranks."""
    if isinstance(error, UserError):
        return {"kind": type(error).__name__, "arguments": [error.what, error.where, error.remedy]}
    return {"kind": "OSError", "arguments": [error.errno, error.strerror or str(error), error.filename]}


def error_from_json(content: Mapping[str, Any]) -> OSError | UserError:
    """The inverse of :func:`error_to_json`. An unknown kind becomes a UserError; an OSError gets its subclass."""
    kinds: dict[str, type[OSError | UserError]] = {kind.__name__: kind for kind in UserError.__subclasses__()}
    kinds["OSError"] = OSError
    return kinds.get(content["kind"], UserError)(*content["arguments"])


@contextmanager
def located(where: str) -> Iterator[None]:
    """Context that prepends ``where`` to the location of UserErrors raised inside."""
    try:
        yield
    except UserError as error:
        if error.where.startswith(where):
            raise
        raise type(error)(error.what, f"{where}: {error.where}" if error.where else where, error.remedy) from error


def note(text: str) -> None:
    """Prints a note to the user on standard error; failures to write are ignored."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or missing stream
        print(f"note: {for_terminal(text)}", file=sys.stderr, flush=True)


def first_line(error: object) -> str:
    """The first line of an error's text; the error's type if it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The remedy that suggests similar names, or lists all choices if none is similar."""
    known = sorted(choices)
    full = spelt_out(word)
    near = [full] if full != word and full in known else difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(known)}"


def spelt_out(word: str) -> str:
    """The key that papers call ``word``: ``top_k`` for ``k``; else the word itself."""
    return _SPELLINGS.get(word, word)


def plural(count: int, noun: str) -> str:
    """For example ``1 rank`` and ``2,000 ranks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
