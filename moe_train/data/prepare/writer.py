"""Writes texts into a data folder: binarised files, raw held-out text, dictionaries."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from moe_train.data.prepare.binarise import binarise
from moe_train.data.stage_progress import Advance
from moe_train.data.text.lines import write_lines
from moe_train.data.text.pairs import SPLITS, Sides
from moe_train.data.text.tokenizer import Tokenizer
from moe_train.data.text.vocabulary import write_dictionary


class FolderWriter:
    """Adds texts to a folder and counts them.

    Args:
        folder: the new data folder.
        languages: those of the dictionary's tags, in order.
        entries: of the dictionary.
        threads: native threads that encode.
        advance: called with the number of sentences written since the last call.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        languages: Sequence[str],
        entries: int,
        threads: int,
        advance: Advance,
    ) -> None:
        self.folder, self.tokenizer, self.languages = folder, tokenizer, tuple(languages)
        self.entries, self.threads, self.advance = entries, threads, advance
        self.counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        self.frequencies = np.zeros(len(tokenizer), dtype=np.int64)
        (folder / "raw").mkdir(exist_ok=True)

    def add_training(self, sides: Sides, *texts: Iterable[str]) -> None:
        """Binarises training text, an iterable of lines for each side, and counts its pieces."""
        for language, lines in zip(sides, texts, strict=True):
            self.frequencies += self._binarise("train", sides, language, lines)

    def add_held_out(self, split: str, sides: Sides, *texts: list[str]) -> None:
        """Binarises held-out text and also writes its raw lines."""
        for language, lines in zip(sides, texts, strict=True):
            write_lines(self.folder / "raw" / f"{split}.{sides.file(language)}", lines)
            self._binarise(split, sides, language, lines)

    def _binarise(self, split: str, sides: Sides, language: str, lines: Iterable[str]) -> np.ndarray:
        prefix = self.folder / f"{split}.{sides.file(language)}"
        sentences, pieces = binarise(lines, prefix, self.tokenizer, self.entries, self.threads, self.advance)
        self.counts[split][sides.name] = sentences
        return pieces

    def write_dictionaries(self, like: Path | None = None) -> None:
        """Writes ``dict.txt`` and a copy per language.

        Args:
            like: an existing ``dict.txt`` to copy, where a vocabulary is reused.
        """
        path = self.folder / "dict.txt"
        if like is None:
            write_dictionary(path, self.tokenizer, self.languages, self.frequencies.tolist())
        else:
            shutil.copyfile(like, path)
        for language in self.languages:
            shutil.copyfile(path, self.folder / f"dict.{language}.txt")
