"""A heartbeat file in a run folder, whose age tells other hosts whether a process trains there.

Log lines may be hours apart, and locks need not be visible to other hosts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_train.safe_text import for_terminal
from moe_train.utils.regular_files import read_regular

BEAT = 30.0  # seconds
FRESH = 4 * BEAT  # network file systems may show a file's time a minute late
_LONGEST = 255  # characters of a host's name


@contextmanager
def heartbeat(path: Path, every: float = BEAT) -> Iterator[None]:
    """While entered, a thread touches ``path`` every few seconds; it holds host and process id. Removed afterwards.

    A killed process leaves the file to grow old. Errors of the file system are ignored.
    """
    done = threading.Event()

    def beat() -> None:
        while True:
            with suppress(OSError):
                os.utime(path) if path.exists() else path.write_text(f"{_host()} {os.getpid()}\n", encoding="utf-8")
            if done.wait(every):
                return

    with suppress(OSError):
        path.unlink(missing_ok=True)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(every)
        with suppress(OSError):
            path.unlink(missing_ok=True)


def alive(path: Path) -> bool:
    """Whether the file was touched less than ``FRESH`` seconds ago."""
    try:
        return time.time() - path.stat().st_mtime < FRESH
    except OSError:
        return False


def other_host(path: Path) -> str:
    """The other host that trains there, by a fresh heartbeat, escaped for a terminal; "" if there is none."""
    try:
        host = read_regular(path).decode("utf-8", "replace").split()[0] if alive(path) else ""
    except (OSError, IndexError):
        return ""
    return "" if host == _host() else for_terminal(host[:_LONGEST])


def _host() -> str:
    return os.uname().nodename
