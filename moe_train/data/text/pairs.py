"""Names of the languages of a text: ``en-de`` is a pair, for both directions; ``de`` is a single language."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moe_train.errors import DataError

SPLITS = ("train", "valid", "test")
SPLIT_WORDS = MappingProxyType({"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"})
"""Name of a split in file names -> the split."""
LANGUAGE = re.compile(r"(?!.{41})[A-Za-z]{2,3}(?:[_@][A-Za-z0-9]+)*")
"""A language code; at most 40 characters, since names of files contain it up to three times."""


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
        if not is_pair(name):
            raise DataError(
                f"'{name[:120]}' is not a pair of languages",
                remedy="write two codes joined by one hyphen, e.g. en-de; inside a code use an underscore (zh_Hans)",
            )
        return cls(*name.split("-"))

    @property
    def name(self) -> str:
        """``source-target``."""
        return f"{self.source}-{self.target}"

    @property
    def reversed(self) -> Pair:
        """The other direction."""
        return Pair(self.target, self.source)

    @property
    def directions(self) -> tuple[str, ...]:
        """Both translation directions."""
        return (self.name, self.reversed.name)

    @property
    def unit(self) -> str:
        """Unit of the text, for messages."""
        return "pairs"

    def file(self, language: str) -> str:
        """The name of one side's file: ``en-de.de``."""
        return f"{self.name}.{language}"

    def __iter__(self) -> Iterator[str]:
        return iter((self.source, self.target))


@dataclass(frozen=True, order=True)
class Single:
    """One language, for text without translations; has the interface of :class:`Pair`."""

    language: str

    @classmethod
    def parse(cls, name: str) -> Single:
        """Reads ``de``.

        Raises:
            DataError: not a language code.
        """
        if not LANGUAGE.fullmatch(name):
            raise DataError(
                f"'{name[:120]}' is not a language code",
                remedy="write two or three letters, with underscores for variants, e.g. de, pt_BR, zh_Hans",
            )
        return cls(name)

    @property
    def name(self) -> str:
        """The language's code."""
        return self.language

    @property
    def reversed(self) -> Single:
        """Itself."""
        return self

    @property
    def directions(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def unit(self) -> str:
        """Unit of the text, for messages."""
        return "lines"

    def file(self, language: str) -> str:
        """The name of its file: ``de``."""
        return language

    def __iter__(self) -> Iterator[str]:
        return iter((self.language,))


Sides = Pair | Single


def is_pair(name: str) -> bool:
    """Whether a name is that of a pair or direction: two different language codes joined by a hyphen."""
    parts = name.split("-")
    return len(parts) == 2 and all(map(LANGUAGE.fullmatch, parts)) and parts[0] != parts[1]


def parse_sides(name: str) -> Sides:
    """Reads ``en-de`` or ``de``.

    Raises:
        DataError: neither a pair nor a language code.
    """
    return Pair.parse(name) if "-" in name else Single.parse(name)


def refuse_double_splits(files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Refuses two files of one split under two words of :data:`SPLIT_WORDS`, as ``dev.en-de`` and ``valid.en-de``.

    Args:
        files: (word, the rest of the name).

    Raises:
        DataError: both are named.
    """
    words: dict[tuple[str, str], str] = {}
    for word, name in files:
        other = words.setdefault((SPLIT_WORDS[word], name), word)
        if other != word:
            raise DataError(
                f"both '{other}.{name}' and '{word}.{name}' would be validation text",
                str(folder),
                "keep one of them, or concatenate them",
            )


def tag(language: str) -> str:
    """The dictionary's symbol for a language: ``__de__``."""
    return f"__{language}__"


MASK = "<mask>"
