"""Processes that end with the one that started them, and not of a Ctrl-C before it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """A parent that is killed outright cannot end us; Linux does it then. Leaves at once where it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


@contextmanager
def children_uninterrupted() -> Iterator[None]:
    """Processes that are started inside never see a Ctrl-C, which a terminal sends to all: their parent ends them.

    Without this each would print a traceback. One that comes meanwhile reaches the parent a moment later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
