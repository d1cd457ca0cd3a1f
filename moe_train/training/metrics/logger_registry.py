"""Loggers by name, for ``training.loggers``: each gets the lines of train.jsonl and valid.jsonl."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from moe_train.config import RunConfig
from moe_train.errors import ConfigError, MissingDependency
from moe_train.plugins import load_plugin, offer_names


class RunLogger(Protocol):
    """Gets the lines of ``train.jsonl`` and ``valid.jsonl`` in their order, on rank 0, in a thread of its own.

    After an error, which is a warning in the log, it gets no more.
    """

    def trained(self, line: Mapping[str, Any]) -> None:
        """A line of train.jsonl."""

    def validated(self, line: Mapping[str, Any]) -> None:
        """A line of valid.jsonl."""

    def close(self) -> None:
        """The session ends, by an error or not."""


#: (run folder, config, update that the session begins at) -> a logger; later lines of an earlier session are void.
LoggerMaker = Callable[[Path, RunConfig, int], RunLogger]
L = TypeVar("L", bound=LoggerMaker)

# name -> module in this folder, class, and the modules that it needs. The extra of the package has the same name.
BUILT_IN: Mapping[str, tuple[str, str, tuple[str, ...]]] = MappingProxyType(
    {
        "wandb": ("wandb_logger", "WandbLogger", ("wandb",)),
        "mlflow": ("mlflow_logger", "MlflowLogger", ("mlflow", "sqlalchemy", "alembic")),
    }
)

_LOGGERS: dict[str, LoggerMaker] = {}


def register_logger(name: str) -> Callable[[L], L]:
    """Decorator that makes ``training.loggers=[name]`` build the decorated class.

    Raises:
        ValueError: the name is taken.
    """

    def add(maker: L) -> L:
        if name in _LOGGERS or name in BUILT_IN:
            raise ValueError(f"the logger {name!r} is registered twice")
        _LOGGERS[name] = maker
        return maker

    return add


def find_loggers(names: Iterable[str]) -> dict[str, LoggerMaker]:
    """The loggers of those names.

    Raises:
        ConfigError: there is none of a name, or its plug-in is broken.
        MissingDependency: a library that it needs is not installed.
    """
    return {name: _maker(name) for name in names}


def _maker(name: str) -> LoggerMaker:
    if name in BUILT_IN:
        module, member, needed = BUILT_IN[name]
        if not all(map(_installed, needed)):
            raise MissingDependency(
                f"the logger '{name}' needs {', '.join(needed)}",
                f"training.loggers=[{name}]",
                f"pip install 'moe_train[{name}]'",
            )
        maker: LoggerMaker = getattr(importlib.import_module(f"{__package__}.{module}"), member)
        return maker
    load_plugin("loggers", name, _LOGGERS)
    if name not in _LOGGERS:
        remedy = offer_names("loggers", name, [*_LOGGERS, *BUILT_IN])
        raise ConfigError(f"there is no logger '{name}'", "training.loggers", remedy)
    return _LOGGERS[name]


def _installed(module: str) -> bool:
    """A folder of that name in the working directory, such as W&B's own, is no module."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None
