"""Progress bars of preparation, one per stage, with Rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from moe_train.screen import Screen

Advance = Callable[[int], None]


class Progress:
    """Stages with a progress bar each.

    Args:
        console: for the output; None: no output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Screen(quiet=True)

    def print(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Shows a bar while the block runs, which calls the yielded function with the amount since the last call."""
        columns = (TextColumn("{task.description:<28}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn())
        with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, expand=True) as bars:
            task = bars.add_task(name, total=total)

            def advance(amount: int) -> None:
                bars.advance(task, amount)

            yield advance
            bars.update(task, total=bars.tasks[0].completed)
