"""Loggers by name, for ``training.loggers``: each gets the lines of train.jsonl and valid.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe_train.config import RunConfig
from moe_train.errors import ConfigError
from moe_train.plugins import load_plugin, offer_names


class RunLogger(Protocol):
    """Gets the lines of ``train.jsonl`` and ``valid.jsonl`` as they are written, on rank 0."""

    def trained(self, line: Mapping[str, Any]) -> None:
        """A line of train.jsonl."""

    def validated(self, line: Mapping[str, Any]) -> None:
        """A line of valid.jsonl."""

    def close(self) -> None:
        """The session ends, by an error or not."""


#: (run folder, config, update that the session begins at) -> a logger; later lines of an earlier session are void.
LoggerMaker = Callable[[Path, RunConfig, int], RunLogger]
L = TypeVar("L", bound=LoggerMaker)

_LOGGERS: dict[str, LoggerMaker] = {}


def register_logger(name: str) -> Callable[[L], L]:
    """Decorator that makes ``training.loggers=[name]`` build the decorated class.

    Raises:
        ValueError: the name is taken.
    """

    def add(maker: L) -> L:
        if name in _LOGGERS:
            raise ValueError(f"the logger {name!r} is registered twice")
        _LOGGERS[name] = maker
        return maker

    return add


def find_loggers(names: Iterable[str]) -> dict[str, LoggerMaker]:
    """The loggers of those names.

    Raises:
        ConfigError: there is none of a name, or its plug-in is broken.
    """
    for name in names:
        load_plugin("loggers", name, _LOGGERS)
        if name not in _LOGGERS:
            raise ConfigError(
                f"there is no logger '{name}'", "training.loggers", offer_names("loggers", name, _LOGGERS)
            )
    return {name: _LOGGERS[name] for name in names}
