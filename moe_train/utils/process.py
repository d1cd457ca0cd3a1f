"""Child processes that end with their parent, and ignore Ctrl-C until then."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Makes Linux kill this process when its parent dies. Exits at once if the parent is already gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


@contextmanager
def children_uninterrupted() -> Iterator[None]:
    """Context in which started processes ignore Ctrl-C, which a terminal sends to all; their parent ends them.

    Otherwise each would print a traceback. A Ctrl-C inside the context reaches the parent at its end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
