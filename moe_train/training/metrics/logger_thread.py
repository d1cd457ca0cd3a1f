"""Runs a logger in a thread of its own, so that one that fails or waits for a server does not hold up the training."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from moe_train.training.metrics.logger_registry import RunLogger

LOG = logging.getLogger("moe_train")
MOST_WAITING = 10_000  # lines
CLOSE_SECONDS = 60.0
Kind = Literal["trained", "validated"]


class LoggerThread:
    """Passes lines to a logger in their order; after its first error, which is a warning, it gets no more.

    Args:
        name: of the logger.
        make: builds it, in the thread.
    """

    def __init__(self, name: str, make: Callable[[], RunLogger], close_seconds: float = CLOSE_SECONDS) -> None:
        self._name, self._close_seconds = name, close_seconds
        self._lines: queue.Queue[tuple[Kind, Mapping[str, Any]] | None] = queue.Queue(MOST_WAITING)
        self._failed, self._lock = threading.Event(), threading.Lock()
        # A daemon: the process ends without it if the logger never returns.
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"logger-{name}", daemon=True)
        self._thread.start()

    def put(self, kind: Kind, line: Mapping[str, Any]) -> None:
        """Queues a line; never waits."""
        if self._failed.is_set():
            return
        try:
            self._lines.put_nowait((kind, line))
        except queue.Full:
            self._give_up(f"has not taken the last {MOST_WAITING:,} lines")

    def close(self) -> None:
        """Closes the logger when it has all lines; leaves it behind if that takes longer than ``close_seconds``."""
        if not self._failed.is_set():
            try:
                self._lines.put(None, timeout=self._close_seconds)
                self._thread.join(self._close_seconds)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._give_up(f"did not end in {self._close_seconds:g} seconds")

    def _run(self, make: Callable[[], RunLogger]) -> None:
        try:
            logger = make()
            while (entry := self._lines.get()) is not None and not self._failed.is_set():
                kind, line = entry
                logger.trained(line) if kind == "trained" else logger.validated(line)
            logger.close()
        except (Exception, SystemExit) as error:
            self._give_up("has failed", error)

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        with self._lock:
            if not self._failed.is_set():
                LOG.warning("the logger '%s' %s and is left out from now on", self._name, why, exc_info=error)
                self._failed.set()
