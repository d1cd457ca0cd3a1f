"""Writes train.jsonl and valid.jsonl on rank 0, and passes their lines to TensorBoard and the run's loggers.

``Trainer`` makes the lines, from :mod:`moe_train.training.metrics.log_lines`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig
from moe_train.training.metrics.flat_numbers import flat_numbers
from moe_train.training.metrics.logger_registry import find_loggers
from moe_train.training.metrics.logger_thread import LoggerThread
from moe_train.training.run.run_folder import RunFolder


class MetricWriter:
    """Writes the logs of a run; ranks other than 0 write nothing.

    Args:
        update: where the session begins; log lines beyond it are removed.
        pending: whether the validation of ``update`` is yet to come: its line is removed, too.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, main: bool, update: int, pending: bool = False) -> None:
        self._train_log, self._valid_log = folder.train_log, folder.valid_log
        self._board: TensorBoard | None = None
        self._loggers: list[LoggerThread] = []
        if main:
            folder.cut(update, pending)
            self._board = TensorBoard(folder.path, update)
            makers = find_loggers(config.training.loggers).items()
            self._loggers = [LoggerThread(name, partial(make, folder.path, config, update)) for name, make in makers]

    def trained(self, line: Mapping[str, Any]) -> None:
        """Writes a line of train.jsonl."""
        self._write("train", self._train_log, line)

    def validated(self, line: Mapping[str, Any]) -> None:
        """Writes a line of valid.jsonl."""
        self._write("valid", self._valid_log, line)

    def _write(self, group: str, log: Path, line: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(line)) + "\n")
        self._board.plot(group, line)
        for logger in self._loggers:
            logger.put("trained" if group == "train" else "validated", line)

    def close(self) -> None:
        """Closes all loggers."""
        if self._board is not None:
            self._board.close()
        for logger in self._loggers:
            logger.close()


class TensorBoard:
    """Plots every number of a line as ``GROUP/NAME``, into ``tensorboard`` in the run folder.

    Args:
        update: where the session begins; later points of an earlier session are removed.
    """

    def __init__(self, folder: Path, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1 if update else None)

    def plot(self, group: str, line: Mapping[str, Any]) -> None:
        """Plots a line of train.jsonl or valid.jsonl."""
        for name, value in flat_numbers(line, group):
            self._board.add_scalar(name, value, int(line["update"]))
        self._board.flush()

    def close(self) -> None:
        """Ends its thread."""
        self._board.close()
