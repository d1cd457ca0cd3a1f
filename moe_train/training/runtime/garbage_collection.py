"""Python's cyclic garbage collector at fixed updates, on all ranks alike.

Left to itself it runs at any moment, for tens of milliseconds in a large process: on one rank while the others wait in
a collective, at another time on the next.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from types import TracebackType

EVERY = 100  # updates


class PeriodicCollection(AbstractContextManager["PeriodicCollection"]):
    """Turns automatic collection off while it is entered, and sets aside what exists by then."""

    def __init__(self) -> None:
        self._enabled = False

    def __enter__(self) -> PeriodicCollection:
        self._enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()  # modules, the model and its optimizer: looked through once
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()

    def after_update(self, update: int) -> None:
        """Collects after each hundredth update."""
        if update % EVERY == 0:
            gc.collect()
