"""The interface and the registry of families: models of Hugging Face transformers by their ``model_type``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from moe_train.config import ModelConfig
from moe_train.errors import ConfigError

PAD, EOS = 1, 2


@dataclass(frozen=True)
class Link:
    """A tensor of a :class:`~moe_train.models.encoder_decoder.TransformerModel` and where its values are.

    Attributes:
        ours: name in a checkpoint, with ``model.``.
        theirs: their names; several are concatenated along the first dimension.
        transposed: ours is the transpose.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False


class Family(ABC):
    """One ``model_type``: what its config means here, and which tensor is which."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    @abstractmethod
    def check(self, settings: Settings) -> None:
        """Refuses values that cannot be imported.

        Raises:
            ConfigError: names the key.
        """

    @abstractmethod
    def model(self, settings: Settings) -> ModelConfig:
        """The model config of a ``config.json``."""

    @abstractmethod
    def routing(self, settings: Settings) -> dict[str, Any]:
        """The routing config of a ``config.json``."""

    @abstractmethod
    def links(self, model: ModelConfig, routing: Mapping[str, Any]) -> Iterator[Link]:
        """Every tensor of the model."""

    @abstractmethod
    def aliases(self, model: ModelConfig) -> Mapping[str, str]:
        """Their further names of a tensor → its name in :meth:`links`."""

    @abstractmethod
    def is_unused(self, name: str) -> bool:
        """Whether their tensor is one that the model does not compute with, or that changes nothing."""

    @abstractmethod
    def settings(self, model: ModelConfig, routing: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`model` and :meth:`routing`: the keys of a ``config.json``.

        Raises:
            ConfigError: this family has not such models.
        """


class Settings:
    """A ``config.json``; every error names file and key."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of a type; ``default`` None: it must be there.

        Raises:
            ConfigError: it is missing, or of another type.
        """
        value = self.content.get(key, default)
        if value is None:
            raise ConfigError(f"'{key}' is missing", self.where)
        right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"'{key}' cannot be {value!r:.60}", self.where)
        return value

    def require(self, key: str, allowed: Iterable[Any], default: Any) -> Any:
        """A value that must be one of ``allowed``.

        Raises:
            ConfigError: it is another.
        """
        value = self.content.get(key, default)
        known = list(allowed)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known):
            choice = " or ".join(map(repr, known))
            raise ConfigError(f"{key}={value!r:.60} is not supported, only {choice}", self.where)
        return value


_FAMILIES: dict[str, Family] = {}
F = TypeVar("F", bound=type[Family])


def register_family(kind: F) -> F:
    """Class decorator: adds a family to the registry.

    Raises:
        ValueError: its ``model_type`` is registered already.
    """
    if kind.model_type in _FAMILIES:
        raise ValueError(f"the model_type {kind.model_type!r} is registered twice")
    _FAMILIES[kind.model_type] = kind()
    return kind


def families() -> Mapping[str, Family]:
    """All families by ``model_type``."""
    return dict(_FAMILIES)
