"""Ends a process at once, and calls with a time limit, when other ranks or the network may be gone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_FLUSH_TIMEOUT = 2.0  # seconds


def run_with_timeout(seconds: float, function: Callable[[], T | None]) -> T | None:
    """The result of ``function``, run in a thread; None where it fails or does not return in time.

    torch's store waits without end for a host that is no longer reachable; then the thread is abandoned.
    """
    results: list[Any] = []

    def call() -> None:
        with suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True, name="run_with_timeout")
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def exit_now(code: int) -> NoReturn:
    """Ends this process at once: destructors of process groups may wait for ranks that are gone.

    Streams are flushed with a time limit: flushing fails on a full disk or a closed pipe, and blocks on a full pipe.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            run_with_timeout(_FLUSH_TIMEOUT, stream.flush)
    finally:
        os._exit(code)
