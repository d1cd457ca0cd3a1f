"""A prepared data folder, as ``moe-prepare`` writes it and training and evaluation read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.data.languages import offer_direction
from moe_train.data.lines import read_lines, sha256
from moe_train.data.manifest import FILE, Manifest
from moe_train.data.pairs import SPLITS, Pair, Sides, parse_sides
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from fairseq.data import Dictionary


@dataclass(frozen=True)
class PairFiles:
    """The binarised files of one direction in one split.

    Attributes:
        source, target: path prefixes (fairseq adds ``.bin`` and ``.idx``), in the order of the direction.
        pair: the name that the files carry, ``de-en`` even when the direction is ``en-de``.
        sentences: number of pairs.
    """

    direction: str
    pair: str
    source: Path
    target: Path
    sentences: int


class DataFolder:
    """Read access to a data folder; make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path | str, verify: bool = False) -> DataFolder:
        """Opens a data folder, checking that its files are those of the manifest.

        Args:
            path: the folder.
            verify: compare checksums too; otherwise sizes only, which takes no time.

        Raises:
            DataError: missing or unfinished folder; a file that is missing, truncated or altered.
        """
        folder = cls(Path(path), Manifest.read(Path(path)))
        for name, expected in folder.manifest.files.items():
            folder._check_file(name, expected, verify)
        return folder

    def _check_file(self, name: str, expected: Any, verify: bool) -> None:
        path = self.path / name
        problem = ""
        if not path.is_file():
            problem = "the file is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"the file has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif verify and sha256(path) != expected["sha256"]:
            problem = "the file's checksum is not the manifest's"
        if problem:
            raise DataError(problem, str(path), "the data folder is damaged: run moe-prepare again with overwrite=true")

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes, sorted; the dictionary's tags stand in this order."""
        return self.manifest.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Every direction that the folder is for; none where it holds text of single languages."""
        return self.manifest.directions

    def directions_of(self, split: str) -> tuple[str, ...]:
        """The directions for which ``train``, ``valid`` or ``test`` has sentences."""
        names = self.manifest.counts.get(split, {})
        return tuple(d for d in self.directions if d in names or Pair.parse(d).reversed.name in names)

    def has(self, split: str, direction: str) -> bool:
        """Whether a split has sentences for a direction."""
        return direction in self.directions_of(split)

    @property
    def tiers(self) -> dict[str, str]:
        """Language -> ``high``, ``medium`` or ``low``."""
        return dict(self.manifest.tiers)

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the manifest: equal for equal data."""
        return sha256(self.path / FILE)

    def dictionary(self) -> Dictionary:
        """The joint fairseq dictionary: pieces, a tag ``__xx__`` per language, ``<mask>``.

        The counts of pieces are their frequencies in the training text.

        Raises:
            MissingDependency: fairseq is not installed.
        """
        from moe_train.data.vocabulary import load_dictionary

        return load_dictionary(self.path / "dict.txt")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path / "spm.model")

    def tokenizer(self) -> Tokenizer:
        """The joint SentencePiece model."""
        return self._tokenizer

    def pair_files(self, split: str, direction: str) -> PairFiles:
        """The binarised files that hold a direction.

        Raises:
            DataError: the split has no such direction (near spellings are offered).
        """
        pair = self._stored(split, direction)
        source, target = (self.prefix(split, Pair.parse(pair), side) for side in direction.split("-"))
        return PairFiles(direction, pair, source, target, self.manifest.counts[split][pair])

    def texts(self, split: str) -> tuple[Sides, ...]:
        """The pairs and the single languages that a split has files of, each once, by name."""
        return tuple(parse_sides(name) for name in sorted(self.manifest.counts.get(split, {})))

    def prefix(self, split: str, sides: Sides, language: str) -> Path:
        """Where the binarised sentences of one language of :meth:`texts` lie (fairseq adds ``.bin`` and ``.idx``)."""
        return self.path / f"{split}.{sides.file(language)}"

    def raw(self, split: str, direction: str) -> tuple[list[str], list[str]]:
        """The untouched text of a held-out split: source lines and target lines, aligned with the binarised files.

        Raises:
            DataError: the split has no such direction, or is ``train``, whose text is not kept.
        """
        if split == "train":
            raise DataError(
                "a data folder keeps no raw training text", str(self.path), "choose split=valid or split=test"
            )
        prefix = f"{split}.{self._stored(split, direction)}"
        source, target = (self._raw_lines(f"{prefix}.{side}") for side in direction.split("-"))
        return source, target

    def _raw_lines(self, name: str) -> list[str]:
        # Folders of earlier versions may hold NUL characters in text that was given.
        return list(read_lines(self.path / "raw" / name, nul=True))

    def _stored(self, split: str, direction: str) -> str:
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}'", str(self.path), did_you_mean(split, SPLITS))
        names = self.manifest.counts.get(split, {})
        if direction in self.directions:
            for name in (direction, Pair.parse(direction).reversed.name):
                if name in names:
                    return name
        known = self.directions_of(split)
        remedy = offer_direction(direction, known) if known else "give files for it and run moe-prepare again"
        raise DataError(f"the split '{split}' has no direction '{direction}'", str(self.path), remedy)
