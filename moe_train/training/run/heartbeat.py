"""A sign of life in a run folder, for readers on other hosts: a small file whose age says whether anybody trains there.

Log lines do not do: hours may lie between them. Nor do locks, which other hosts need not see.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 30.0  # seconds
FRESH = 4 * BEAT  # network file systems may show a file's time a minute late


@contextmanager
def heartbeat(path: Path, every: float = BEAT) -> Iterator[None]:
    """While entered, a thread touches ``path`` every so many seconds; it holds the host and process. Gone afterwards.

    Who is killed leaves it to grow old. A full disk, or one that is away for a while, ends nothing.
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
    """Whether the file was touched a moment ago."""
    try:
        return time.time() - path.stat().st_mtime < FRESH
    except OSError:
        return False


def other_host(path: Path) -> str:
    """The host that trains there, by a fresh sign of life; "" where there is none, or it is this one."""
    try:
        host = path.read_text(encoding="utf-8").split()[0] if alive(path) else ""
    except (OSError, IndexError):
        return ""
    return "" if host == _host() else host


def _host() -> str:
    return os.uname().nodename
