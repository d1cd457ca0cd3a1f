"""Reads labelled texts: files ``{train,valid,test}.NAME.tsv`` with a line ``label<TAB>text`` per item.

``dev`` and ``val`` are ``valid``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_train.data.text.languages import is_english, one_code_each
from moe_train.data.text.lines import read_lines, reading, sha256
from moe_train.data.text.pairs import SPLIT_WORDS, SPLITS, refuse_double_splits
from moe_train.data.verification import InputFiles
from moe_train.errors import DataError, did_you_mean


@dataclass(frozen=True)
class LabelledFile:
    """One file.

    Attributes:
        name: part of the file name between split and ``.tsv``: ``de``, or ``de.in_en`` for the same items in English.
        labels: [N] indices of classes.
        texts: [N].
        first_uid: number of its first item among those of all files.
    """

    name: str
    labels: tuple[int, ...]
    texts: tuple[str, ...]
    first_uid: int


class LabelledTexts:
    """A folder of labelled files; make one with :meth:`open`."""

    def __init__(
        self,
        path: Path,
        classes: Sequence[str],
        splits: Mapping[str, Mapping[str, LabelledFile]],
        unread: Sequence[Path] = (),
    ) -> None:
        self.path, self.classes, self.splits = path, tuple(classes), splits
        self.unread = [file.name for file in unread if not file.name.startswith(".")]

    @classmethod
    def open(cls, path: Path | str, languages: Sequence[str]) -> LabelledTexts:
        """Reads every file of the folder.

        Args:
            languages: those whose training files define the classes. Their codes are used also where a file has another
                one of the same language (``en`` for ``train.eng_Latn.tsv``).

        Raises:
            DataError: no folder; no training file of a language; two files of one set; a line without a tab, or with a
                label that is not in the training files (file and line are named).
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError("the folder of labelled texts does not exist", str(folder), "correct data=…")
        files = _files(folder, languages)
        for language in languages:
            if language not in files["train"]:
                raise DataError(f"the file train.{language}.tsv is missing", str(folder), "correct task.languages=…")
        read = {file: _read(file) for named in files.values() for file in named.values()}
        classes = sorted({label for language in languages for label, _ in read[files["train"][language]]})
        splits: dict[str, dict[str, LabelledFile]] = {split: {} for split in SPLITS}
        uid = 0
        for split, named in files.items():
            for name, file in named.items():
                splits[split][name] = _labelled(file, name, read[file], classes, uid)
                uid += len(read[file])
        return cls(folder, classes, splits, [file for file in sorted(folder.iterdir()) if file not in read])

    @property
    def inputs(self) -> InputFiles:
        """The files that were read."""
        names = tuple(f"{split}.{name}.tsv" for split, files in self.splits.items() for name in files)
        return InputFiles(self.path, names)

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the contents of all files."""
        digest = hashlib.sha256()
        with reading(self.path):
            for file in sorted(self.path.glob("*.tsv")):
                digest.update(f"{file.name} {sha256(file)}\n".encode())
        return digest.hexdigest()


def _files(folder: Path, languages: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Split -> name -> file, in order."""
    found = {}
    for file in sorted(folder.glob("*.tsv")):
        word, _, name = file.name.removesuffix(".tsv").partition(".")
        if word in SPLIT_WORDS and name:
            found[word, name] = file
    refuse_double_splits(found, folder)
    code_of = one_code_each([*languages, *(name.split(".")[0] for _, name in found)])
    files: dict[str, dict[str, Path]] = {split: {} for split in SPLITS}
    for (word, name), file in found.items():
        code, dot, rest = name.partition(".")
        if rest.startswith("in_") and is_english(rest.removeprefix("in_")):
            rest = "in_en"
        other = files[SPLIT_WORDS[word]].setdefault(code_of[code] + dot + rest, file)
        if other is not file:
            what = f"'{other.name}' and '{file.name}' are of one language"
            raise DataError(what, str(folder), "keep one of them, or concatenate them")
    return files


def _read(file: Path) -> list[tuple[str, str]]:
    lines = []
    for number, line in enumerate(read_lines(file), 1):
        label, tab, text = line.partition("\t")
        if not tab:
            raise DataError("a line without a tab", f"{file}, line {number}", "write label<TAB>text")
        # Concatenated files have byte order marks within.
        lines.append((label.lstrip("\ufeff"), text))
    if not lines:
        raise DataError("the file is empty", str(file), "remove it, or add lines of label<TAB>text")
    return lines


def _labelled(
    file: Path, name: str, lines: Sequence[tuple[str, str]], classes: Sequence[str], uid: int
) -> LabelledFile:
    numbers = {label: number for number, label in enumerate(classes)}
    for number, (label, _) in enumerate(lines, 1):
        if label not in numbers:
            raise DataError(f"unknown label '{label}'", f"{file}, line {number}", did_you_mean(label, classes))
    return LabelledFile(name, tuple(numbers[label] for label, _ in lines), tuple(text for _, text in lines), uid)
