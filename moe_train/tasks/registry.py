"""Tasks by name: ``task.name`` of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moe_train.config import RunConfig
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError, did_you_mean
from moe_train.tasks.base import TrainingTask

TaskBuilder = Callable[[RunConfig, DataFolder], TrainingTask]
B = TypeVar("B", bound=TaskBuilder)

_TASKS: dict[str, TaskBuilder] = {}


def register_task(name: str) -> Callable[[B], B]:
    """Decorator that makes ``task.name=name`` build the decorated class.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(builder: B) -> B:
        if name in _TASKS:
            raise ValueError(f"the task {name!r} is registered twice")
        _TASKS[name] = builder
        return builder

    return decorate


def build_task(config: RunConfig, folder: DataFolder) -> TrainingTask:
    """The task that ``config.task.name`` names.

    Raises:
        ConfigError: there is none.
    """
    if config.task.name not in _TASKS:
        raise ConfigError(f"there is no task '{config.task.name}'", remedy=did_you_mean(config.task.name, _TASKS))
    return _TASKS[config.task.name](config, folder)
