"""Fails a test that starts a process or listens at a port, unless it is marked ``processes`` or ``slow``.

Every test may run the commands of ``TOOLS``, which take a moment: each run records its commit by git.
"""

from __future__ import annotations

import multiprocessing.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import pytest

EVENTS = {
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "socket.bind",
}
TOOLS = {"git", "ruff", "mypy", "cc", "gcc", "mount", "umount"}  # short commands that every test may run


class ProcessGuard:
    """Watches the process of the tests with an audit hook, which lasts as long as the interpreter."""

    def __init__(self) -> None:
        self._test: str | None = None
        self._refused: list[str] = []
        self._pid = 0

    def install(self) -> None:
        """Adds the hook. Multiprocessing starts forkservers without an event: they get one."""
        spawn = multiprocessing.util.spawnv_passfds

        def audited(path: bytes, words: Sequence[Any], descriptors: Sequence[int]) -> int:
            sys.audit("os.posix_spawn", path, words, None)
            return spawn(path, words, descriptors)

        multiprocessing.util.spawnv_passfds = audited
        self._pid = os.getpid()
        sys.addaudithook(self._audit)

    def begin(self, item: pytest.Item) -> None:
        """Guards the test, and the fixtures made for it, until ``end``. Slow tests are in no fast run."""
        free = item.get_closest_marker("processes") or item.get_closest_marker("slow")
        self._test = None if free else item.nodeid
        self._refused = []

    def check(self) -> None:
        """Fails the test if its code or a thread of it has caught the failure that the hook raised."""
        if self._refused:
            pytest.fail("\n".join(self._refused))

    def end(self) -> None:
        """Guards no test."""
        self._test = None

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self._test is None or os.getpid() != self._pid:
            return
        if event != "subprocess.Popen" or os.path.basename(arguments[0]) not in TOOLS:
            self._refused.append(f"{self._test} is not marked 'processes' but calls {event}{arguments[:2]}")
            pytest.fail(self._refused[-1])
