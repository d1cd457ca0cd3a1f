"""How far a process has come, for whoever watches whether it still gets on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class ProgressMarker:
    """Marked by the loop, read by :mod:`moe_train.launch.watchdog.watchdog` from another thread.

    Attributes:
        beats: marks so far; whoever sees this number unchanged sees no progress.
        update: the update under way, counted from 1; 0 before the first.
        phase: what is being done.
        run: the run folder, once it is known.
    """

    beats: int = 0
    update: int = 0
    phase: str = "getting ready"
    run: Path | None = None

    def mark(self, phase: str, update: int | None = None) -> None:
        """Something new begins."""
        if update is not None:
            self.update = update
        self.phase = phase
        self.beats += 1
