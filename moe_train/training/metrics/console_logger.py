"""Progress of a run on the console and in the log file: a line per log entry, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_train.tasks.metric_registry import shown_text

LOG = logging.getLogger("moe_train")
_NAMED = 3  # layers whose experts without tokens are counted by name
_SPEED_PERIOD = 3600.0  # seconds of which the time left is reckoned: after Rich's 30 a slow update has no time left


class ConsoleLogger:
    """Prints progress on rank 0, and writes the same lines to the log file of every rank.

    Args:
        console: None: no screen.
        blocks: number of a sparse block → its place in the model (:func:`moe_train.models.routed.block_names`).
    """

    def __init__(
        self, total: int, done: int, console: Console | None, blocks: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self._console, self._blocks = console, blocks
        self._total, self._first = total, done
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("update"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),  # as wide as the terminal lets it
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
                speed_estimate_period=_SPEED_PERIOD,
            )
            self._task = self._bar.add_task("update", total=total, completed=done)

    def __enter__(self) -> ConsoleLogger:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, update: int) -> None:
        """After every update."""
        if self._bar is not None:
            self._bar.update(self._task, completed=update)

    def trained(self, line: Mapping[str, Any]) -> None:
        """Prints a line of train.jsonl, and the time left if there is no bar that shows it."""
        update = line["update"]
        text = f"update {update}/{self._total}: {training_text(line, self._blocks)}"
        if self._bar is None:
            per_update = (time.monotonic() - self._started) / max(update - self._first, 1)
            minutes, seconds = divmod(int(per_update * (self._total - update)), 60)
            text += f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        self.say(text)

    def validated(self, line: Mapping[str, Any], best: bool) -> None:
        """Prints a line of valid.jsonl."""
        bleu = f", BLEU {line['bleu']:.2f}" if "bleu" in line else ""
        self.say(
            f"validation at update {line['update']}: loss {line['loss']:.4f}, nll {line['nll_loss']:.4f}, "
            f"ppl {line['ppl']:.2f}{bleu}{shown_text(line)}{' (best so far)' if best else ''}"
        )

    def say(self, text: str) -> None:
        """Prints a line on the console and in the log."""
        LOG.info("%s", text)
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def training_text(line: Mapping[str, Any], blocks: Mapping[int, str] = MappingProxyType({})) -> str:
    """The figures of a training line, short.

    Args:
        blocks: as of :class:`ConsoleLogger`.
    """
    parts = [f"loss {line['loss']:.3f}"]
    if line.get("ppl") is not None:
        parts.append(f"ppl {line['ppl']:.2f}")
    parts[-1] += shown_text(line)
    parts.append(f"lr {line['lr']:.2e}")
    unit = "images" if "images_per_second" in line else "words"
    parts.append(f"{line[f'{unit}_per_second']:,.0f} {unit}/s")
    if line.get("load_max_over_mean"):
        parts.append(f"load max/mean {max(line['load_max_over_mean'].values()):.2f}")
        if line["dead_experts"]:
            parts.append(_without_tokens(line["load"], blocks))
        if line["dropped"]:
            parts.append(f"dropped {line['dropped_fraction']:.1%}")
    if line.get("exchange_dropped"):
        parts.append(f"{line['exchange_dropped']:,} pairs beyond layout.fixed_rows")
    if line.get("skipped"):
        parts.append(f"{line['skipped']} skipped")
    return ", ".join(parts)


def _without_tokens(loads: Mapping[str, Sequence[float]], blocks: Mapping[int, str]) -> str:
    """The number of experts without tokens, and the layers that have most of them."""
    dead = {layer: sum(share == 0 for share in load) for layer, load in loads.items()}
    worst = sorted((layer for layer in dead if dead[layer]), key=lambda layer: (-dead[layer], int(layer)))
    places = [f"{blocks.get(int(layer), f'sparse block {layer}')} ({dead[layer]})" for layer in worst[:_NAMED]]
    places += [f"{len(worst) - _NAMED} more"] if len(worst) > _NAMED else []
    count, total = sum(dead.values()), sum(map(len, loads.values()))
    return f"{count} of {total} experts without tokens: {', '.join(places)}"
