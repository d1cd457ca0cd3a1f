"""How a rank leaves, and asks the store a last time, when others or the network may be gone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_FLUSHING = 2.0  # seconds


def within(seconds: float, question: Callable[[], T | None]) -> T | None:
    """The answer, or None where none came in time or the question failed.

    torch's store waits without end for a host that the network has swallowed; the thread that asks is left behind.
    """
    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True, name="last question")
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def leave(code: int) -> NoReturn:
    """Ends this process at once: process groups may wait in their destructors for ranks that are gone.

    Whatever its streams do: a full disk or a closed pipe makes flushing fail, and a pipe that nobody reads blocks it.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            within(_FLUSHING, stream.flush)
    finally:
        os._exit(code)
