"""Writes what happens, on rank 0: JSON lines, and whatever the run's loggers make of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig
from moe_train.training.metrics.loggers import LoggerMaker, RunLogger, TensorBoard, find_loggers
from moe_train.training.run.run_folder import RunFolder

LOG = logging.getLogger("moe_train")


class MetricWriter:
    """The run's logs; other ranks than 0 write nothing.

    Args:
        update: where the run goes on: what the logs hold beyond it is removed.
        pending: whether that update's validation is yet to come (again, perhaps: the checkpoint is from before it).
    """

    def __init__(self, folder: RunFolder, config: RunConfig, main: bool, update: int, pending: bool = False) -> None:
        self._folder = folder if main else None
        self._loggers: dict[str, RunLogger] = {}
        if main:
            folder.cut(update, pending)
            self._board = TensorBoard(folder.path, config, update)
            for name, make in find_loggers(config.training.loggers).items():
                self._tell(name, self._add, name, make, folder.path, config, update)

    def trained(self, line: Mapping[str, Any]) -> None:
        """A line of train.jsonl."""
        if self._folder is not None:
            self._folder.append(self._folder.train_log, line)
            self._board.trained(line)
            for name, logger in list(self._loggers.items()):
                self._tell(name, logger.trained, line)

    def validated(self, line: Mapping[str, Any]) -> None:
        """A line of valid.jsonl."""
        if self._folder is not None:
            self._folder.append(self._folder.valid_log, line)
            self._board.validated(line)
            for name, logger in list(self._loggers.items()):
                self._tell(name, logger.validated, line)

    def close(self) -> None:
        """Ends all loggers."""
        if self._folder is not None:
            self._board.close()
        for name, logger in list(self._loggers.items()):
            self._tell(name, logger.close)

    def _add(self, name: str, make: LoggerMaker, folder: Path, config: RunConfig, update: int) -> None:
        self._loggers[name] = make(folder, config, update)

    def _tell(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        """A logger from outside that fails is told nothing more; the training goes on."""
        try:
            call(*arguments)
        except Exception as error:
            LOG.warning("the logger '%s' has failed and is left out from now on", name, exc_info=error)
            self._loggers.pop(name, None)
