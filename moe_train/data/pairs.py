"""Language pairs and directions by name: ``en-de`` is source and target; a pair serves both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.errors import DataError

SPLITS = ("train", "valid", "test")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:[_@][A-Za-z0-9]+)*")


@dataclass(frozen=True, order=True)
class Pair:
    """Two languages, in the order of the files' name."""

    source: str
    target: str

    @classmethod
    def parse(cls, name: str) -> Pair:
        """Reads ``en-de``.

        Raises:
            DataError: not two language codes joined by a hyphen.
        """
        parts = name.split("-")
        if len(parts) != 2 or not all(LANGUAGE.fullmatch(part) for part in parts) or parts[0] == parts[1]:
            raise DataError(
                f"'{name}' is not a pair of languages",
                remedy="write two codes joined by one hyphen, e.g. en-de; inside a code use an underscore (zh_Hans)",
            )
        return cls(*parts)

    @property
    def name(self) -> str:
        """``source-target``."""
        return f"{self.source}-{self.target}"

    @property
    def reversed(self) -> Pair:
        """The other direction."""
        return Pair(self.target, self.source)

    def __iter__(self) -> Iterator[str]:
        return iter((self.source, self.target))


def tag(language: str) -> str:
    """The dictionary's symbol for a language: ``__de__``."""
    return f"__{language}__"


MASK = "<mask>"
