"""A prepared data folder, as ``moe-prepare`` writes it and training and evaluation read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.run import DataVerify
from moe_train.data.manifest import FILE, Manifest
from moe_train.data.text.languages import offer_direction
from moe_train.data.text.lines import read_lines, reading, sha256
from moe_train.data.text.pairs import MASK, SPLITS, Pair, Sides, parse_sides, tag
from moe_train.data.text.tokenizer import Tokenizer
from moe_train.data.text.vocabulary import dictionary_size, load_dictionary, read_piece_ids
from moe_train.data.verification import InputFiles, sha256_of_files
from moe_train.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from fairseq.data import Dictionary

VOCABULARY = ("spm.model", "dict.txt")
_TRAINING = re.compile(r"train\..*\.bin")


@dataclass(frozen=True)
class PairFiles:
    """The binarised files of one direction in one split.

    Attributes:
        source, target: path prefixes (fairseq adds ``.bin`` and ``.idx``), in the order of the direction.
        pair: in the names of the files, such as ``de-en`` also for the direction ``en-de``.
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

    @property
    def inputs(self) -> InputFiles:
        """None: the manifest lists all files."""
        return InputFiles(self.path)

    @classmethod
    def open(cls, path: Path | str, verify: bool = False) -> DataFolder:
        """Opens a data folder, checking that its files are those of the manifest.

        Args:
            path: the folder.
            verify: also compare checksums (:meth:`verify`); else only sizes, without reading the files.

        Raises:
            DataError: missing or unfinished folder; a file that is missing, truncated or altered.
        """
        folder = cls(Path(path), Manifest.read(Path(path)))
        for name, expected in folder.manifest.files.items():
            try:
                size = (folder.path / name).stat().st_size
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                problem = "the file is missing" if missing else f"the file cannot be read ({error.strerror})"
                raise folder._damaged(name, problem) from None
            if size != expected["bytes"]:
                raise folder._damaged(name, f"the file has {size} bytes instead of {expected['bytes']}")
        if verify:
            folder.verify("always")
        return folder

    def verify(self, how: DataVerify = "once", training: bool = True, share: tuple[int, int] = (0, 1)) -> None:
        """Compares files with the checksums of the manifest (:mod:`moe_train.data.verification`).

        Args:
            training: the training sentences too, which only training reads, and which are most of the folder.
            share: (n, of): the files whose number modulo ``of`` is n; processes of a host divide the work.

        Raises:
            DataError: a file that is altered or cannot be read; it is named.
        """
        files = self.manifest.files
        names = sorted(name for name in files if training or not _TRAINING.fullmatch(name))
        for name, digest in sha256_of_files(self.path, names[share[0] :: share[1]], how).items():
            if digest != files[name]["sha256"]:
                raise self._damaged(name, "the file's checksum is not the manifest's: it was altered")

    def _damaged(self, name: str, problem: str) -> DataError:
        remedy = "the data folder is damaged: restore it, or run moe-prepare again with overwrite=true"
        return DataError(problem, str(self.path / name), remedy)

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes, sorted; the dictionary's tags are in this order."""
        return self.manifest.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """All directions of the folder; none where it contains text of single languages."""
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
        with reading(self.path / FILE):
            return sha256(self.path / FILE)

    def vocabulary_digests(self) -> dict[str, str]:
        """Checksums of the files ``spm.model`` and ``dict.txt``: equal for models that can exchange weights.

        Raises:
            DataError: one of them cannot be read.
        """
        return sha256_of_files(self.path, VOCABULARY, "always")

    def dictionary(self) -> Dictionary:
        """The joint fairseq dictionary: pieces, a tag ``__xx__`` per language, ``<mask>``.

        The counts of pieces are their frequencies in the training text.

        Raises:
            DataError: its size or its language tags do not match the manifest.
            MissingDependency: fairseq is not installed.
        """
        path = self.path / "dict.txt"
        dictionary = load_dictionary(path)
        self._check_entries(path, len(dictionary))
        for symbol in (*map(tag, self.languages), *([] if self.manifest.ids_by_name else [MASK])):
            if symbol not in dictionary.indices:
                raise self._damaged(path.name, f"the dictionary has no '{symbol}'")
        return dictionary

    def _check_entries(self, path: Path, found: int) -> None:
        if found != self.manifest.vocabulary:
            problem = f"the vocabulary has {found} entries, but {self.manifest.vocabulary} in the manifest"
            raise self._damaged(path.name, problem)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer(self.path / "spm.model")
        if self.manifest.ids_by_name:
            return Tokenizer(tokenizer.path, read_piece_ids(self.path / "dict.txt", tokenizer))
        self._check_entries(tokenizer.path, dictionary_size(tokenizer, self.languages))
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The joint SentencePiece model.

        Raises:
            DataError: it cannot be read, or its number of pieces does not match the manifest.
        """
        return self._tokenizer

    def pair_files(self, split: str, direction: str) -> PairFiles:
        """The binarised files of a direction.

        Raises:
            DataError: the split does not have the direction (near spellings are suggested).
        """
        pair = self._stored(split, direction)
        source, target = (self.prefix(split, Pair.parse(pair), side) for side in direction.split("-"))
        return PairFiles(direction, pair, source, target, self.manifest.counts[split][pair])

    def texts(self, split: str) -> tuple[Sides, ...]:
        """The pairs and single languages with files in a split, each once, sorted by name."""
        return tuple(parse_sides(name) for name in sorted(self.manifest.counts.get(split, {})))

    def prefix(self, split: str, sides: Sides, language: str) -> Path:
        """Path prefix of the binarised sentences of one language of :meth:`texts` (without ``.bin`` and ``.idx``)."""
        return self.path / f"{split}.{sides.file(language)}"

    def raw(self, split: str, direction: str) -> tuple[list[str], list[str]]:
        """The raw text of a held-out split: source lines and target lines, aligned with the binarised files.

        Raises:
            DataError: the split does not have the direction, or is ``train``, whose raw text is not kept; a file cannot
                be read, or its number of lines does not match the manifest.
        """
        if split == "train":
            raise DataError(
                "a data folder has no raw training text", str(self.path), "choose split=valid or split=test"
            )
        pair = self._stored(split, direction)
        source, target = (self._raw(split, pair, side) for side in direction.split("-"))
        return source, target

    def _raw(self, split: str, pair: str, side: str) -> list[str]:
        name, wanted = f"raw/{split}.{pair}.{side}", self.manifest.counts[split][pair]
        with reading(self.path / name):
            # Folders of earlier versions may contain NUL characters in held-out files of users.
            lines = list(read_lines(self.path / name, nul=True))
        if len(lines) != wanted:
            raise self._damaged(name, f"the file has {len(lines)} lines instead of {wanted}")
        return lines

    def _stored(self, split: str, direction: str) -> str:
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}'", str(self.path), did_you_mean(split, SPLITS))
        names = self.manifest.counts.get(split, {})
        if direction in self.directions:
            for name in (direction, Pair.parse(direction).reversed.name):
                if name in names:
                    return name
        known = self.directions_of(split)
        remedy = offer_direction(direction, known) if known else "add files for it and run moe-prepare again"
        raise DataError(f"the split '{split}' has no direction '{direction}'", str(self.path), remedy)
