"""The registry of tasks, by ``task.name``.

A new task derives from ``TrainingTask`` (``tasks/base.py``) and is decorated with :func:`register_task`. Tasks of
the package are imported in ``tasks/__init__.py``, others by an entry point or ``user_dir`` (docs/add-a-task.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe_train.config import RunConfig
from moe_train.data.folder import DataFolder
from moe_train.data.verification import InputFiles
from moe_train.errors import ConfigError
from moe_train.plugins import load_plugin, offer_names
from moe_train.tasks.base import TrainingTask


class TaskData(Protocol):
    """Interface of a task's data."""

    @property
    def path(self) -> Path:
        """Its folder or file."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data."""

    @property
    def inputs(self) -> InputFiles:
        """Files that no manifest lists, whose checksums a run keeps."""


TaskBuilder = Callable[[RunConfig, Any], TrainingTask]
B = TypeVar("B", bound=TaskBuilder)


@dataclass(frozen=True)
class _Entry:
    """A registered task.

    Attributes:
        open_data: config → the data that the builder takes.
        built_in: values of ``data=`` that are not paths.
    """

    builder: TaskBuilder
    open_data: Callable[[RunConfig], TaskData]
    built_in: tuple[str, ...]


_TASKS: dict[str, _Entry] = {}


def _prepared(config: RunConfig) -> DataFolder:
    return DataFolder.open(config.data)


def register_task(
    name: str, open_data: Callable[[RunConfig], TaskData] = _prepared, built_in: tuple[str, ...] = ()
) -> Callable[[B], B]:
    """Decorator that makes ``task.name=name`` build the decorated class.

    Args:
        open_data: opens what ``data=`` names; by default a folder made by ``moe-prepare``.
        built_in: values of ``data=`` that are not paths.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(builder: B) -> B:
        if name in _TASKS:
            raise ValueError(f"the task {name!r} is registered twice")
        _TASKS[name] = _Entry(builder, open_data, built_in)
        return builder

    return decorate


def build_task(config: RunConfig, data: Any) -> TrainingTask:
    """The task that ``config.task.name`` names, on data that :func:`open_data` has opened.

    Raises:
        ConfigError: there is none.
    """
    return _entry(config).builder(config, data)


def open_data(config: RunConfig) -> Any:
    """The data that the task trains on.

    Raises:
        ConfigError: no such task.
        DataError: the data is missing or damaged.
    """
    return _entry(config).open_data(config)


def locate_data(config: RunConfig) -> str:
    """``data=`` as an absolute path, so that the run can be read from any directory; built-in names are unchanged."""
    return config.data if config.data in _entry(config).built_in else os.path.abspath(config.data)


def _entry(config: RunConfig) -> _Entry:
    load_plugin("tasks", config.task.name, _TASKS)
    if config.task.name not in _TASKS:
        raise ConfigError(
            f"there is no task '{config.task.name}'", remedy=offer_names("tasks", config.task.name, _TASKS)
        )
    return _TASKS[config.task.name]
