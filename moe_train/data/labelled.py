"""Labelled texts: files ``{train,valid,test}.NAME.tsv`` with a line ``label<TAB>text`` per item."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_train.data.lines import sha256
from moe_train.errors import DataError, did_you_mean

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class LabelledFile:
    """One file.

    Attributes:
        name: what stands between the split and ``.tsv``: ``de``, or ``de.in_en`` for the same items in English.
        labels: [N] numbers of classes.
        texts: [N].
        first_uid: number of its first item among those of all files.
    """

    name: str
    labels: tuple[int, ...]
    texts: tuple[str, ...]
    first_uid: int


class LabelledTexts:
    """A folder of labelled files; make one with :meth:`open`."""

    def __init__(self, path: Path, classes: Sequence[str], splits: Mapping[str, Mapping[str, LabelledFile]]) -> None:
        self.path, self.classes, self.splits = path, tuple(classes), splits

    @classmethod
    def open(cls, path: Path | str, languages: Sequence[str]) -> LabelledTexts:
        """Reads every file of the folder.

        Args:
            languages: whose training files name the classes.

        Raises:
            DataError: no folder; no training file of a language; a line without a tab, or with a label that training
                has not (file and line are named).
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError("there is no such folder of labelled texts", str(folder), "correct data=…")
        for language in languages:
            if not (folder / f"train.{language}.tsv").is_file():
                raise DataError(f"the file train.{language}.tsv is missing", str(folder), "correct task.languages=…")
        read = {file: _read(file) for split in SPLITS for file in sorted(folder.glob(f"{split}.*.tsv"))}
        training = [folder / f"train.{language}.tsv" for language in languages]
        classes = sorted({label for file in training for label, _ in read[file]})
        splits: dict[str, dict[str, LabelledFile]] = {split: {} for split in SPLITS}
        uid = 0
        for file, lines in read.items():
            split, _, rest = file.name.partition(".")
            name = rest.removesuffix(".tsv")
            splits[split][name] = _labelled(file, name, lines, classes, uid)
            uid += len(lines)
        return cls(folder, classes, splits)

    @cached_property
    def fingerprint(self) -> str:
        """Of all files' contents."""
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.tsv")):
            digest.update(f"{file.name} {sha256(file)}\n".encode())
        return digest.hexdigest()


def _read(file: Path) -> list[tuple[str, str]]:
    lines = []
    try:
        with file.open(encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                label, tab, text = line.rstrip("\r\n").partition("\t")
                if not tab:
                    raise DataError("a line without a tab", f"{file}, line {number}", "write label<TAB>text")
                lines.append((label, text))
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 ({error.reason})", str(file), "convert it to UTF-8") from None
    if not lines:
        raise DataError("the file is empty", str(file), "remove it or give lines of label<TAB>text")
    return lines


def _labelled(
    file: Path, name: str, lines: Sequence[tuple[str, str]], classes: Sequence[str], uid: int
) -> LabelledFile:
    numbers = {label: number for number, label in enumerate(classes)}
    for number, (label, _) in enumerate(lines, 1):
        if label not in numbers:
            raise DataError(f"unknown label '{label}'", f"{file}, line {number}", did_you_mean(label, classes))
    return LabelledFile(name, tuple(numbers[label] for label, _ in lines), tuple(text for _, text in lines), uid)
