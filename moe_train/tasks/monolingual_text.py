"""A split of a data folder read as text of single languages, and as pairs: a sentence, then its translation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_train.config.tasks import LanguageModelConfig
from moe_train.data.folder import DataFolder
from moe_train.data.text.languages import find_same
from moe_train.data.text.pairs import Sides, Single
from moe_train.errors import DataError, did_you_mean
from moe_train.tasks.indexed_dataset import Indices, SentenceFile
from moe_train.tasks.packing import PackedFile

if TYPE_CHECKING:
    from fairseq.data import Dictionary


@dataclass(frozen=True)
class Piece:
    """Sentences or blocks of one file, or sentences of two files side by side.

    Attributes:
        files: one, or a sentence and its translation.
        languages: number of each file's language.
        first_uid: number of the first sentence among all of the split's files and pairs.
    """

    files: tuple[SentenceFile | PackedFile, ...]
    languages: tuple[int, ...]
    first_uid: int

    @property
    def lengths(self) -> Indices:
        """[N] tokens: a beginning, and each sentence with its end."""
        total: Indices = 1 + np.sum([file.sizes for file in self.files], axis=0)
        return total


class MonolingualText:
    """Items by stream (a language, or a pair), one stream after the other.

    Attributes:
        names: of the streams: ``de``, or ``de-en`` for pairs.
        sizes: items of each stream.
        lengths: [N] tokens of each item.
    """

    def __init__(self, streams: Sequence[tuple[str, Sequence[Piece]]], bos: int, pad: int) -> None:
        self.bos, self.pad = bos, pad
        self.names = [name for name, _ in streams]
        self.sizes = [sum(len(piece.lengths) for piece in pieces) for _, pieces in streams]
        self._pieces = [piece for _, pieces in streams for piece in pieces]
        parts = [piece.lengths for piece in self._pieces]
        self._first = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths = np.concatenate(parts) if parts else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def items(self, name: str) -> Indices:
        """The items of a stream."""
        number = self.names.index(name)
        first = sum(self.sizes[:number])
        return np.arange(first, first + self.sizes[number])

    def tokens(self, indices: Indices) -> tuple[Indices, Indices, Indices]:
        """tokens [B, S], right-padded; uids [B]; languages [B, 2] (of the first and of the last sentence)."""
        rows, lengths = len(indices), self.lengths[indices]
        table = np.full((rows, max(1, lengths.max(initial=0))), self.pad, np.int64)
        uids, languages = np.zeros(rows, np.int64), np.zeros((rows, 2), np.int64)
        which = np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(which):
            piece, here = self._pieces[number], np.flatnonzero(which == number)
            sentences = indices[here] - self._first[number]
            self._fill(table, here, piece, sentences)
            uids[here] = piece.first_uid + piece.files[0].numbers(sentences)
            languages[here] = piece.languages[0], piece.languages[-1]
        return table, uids, languages

    def _fill(self, table: Indices, rows: Indices, piece: Piece, sentences: Indices) -> None:
        table[rows, 0] = self.bos
        piece.files[0].fill(table, rows, sentences, column=1)
        if len(piece.files) == 2:
            # Second sentences begin in different columns: those of one column are filled together.
            starts = 1 + piece.files[0].sizes[sentences]
            for start in np.unique(starts):
                group = np.flatnonzero(starts == start)
                piece.files[1].fill(table, rows[group], sentences[group], column=int(start))


def open_text(
    folder: DataFolder, split: str, keys: LanguageModelConfig, dictionary: Dictionary, block: int | None = None
) -> MonolingualText:
    """Opens a split; pairs of the translation LM are streams of their own, in ``train`` only.

    Args:
        block: pack sentences into blocks of this many tokens, beginning included; pairs never are (None: no blocks).

    Raises:
        DataError: a language that the folder has not, or a split without text of those wanted.
    """
    wanted = []
    for language in keys.languages or folder.languages:
        code = find_same(language, folder.languages)
        if code is None:
            raise DataError(
                f"the data folder has no language '{language}'",
                str(folder.path),
                did_you_mean(language, folder.languages),
            )
        wanted.append(code)
    by_language: dict[str, list[Piece]] = {language: [] for language in sorted(wanted)}
    pairs: list[tuple[str, list[Piece]]] = []
    uid = 0
    for sides in folder.texts(split):
        numbers = tuple(folder.languages.index(side) for side in sides)
        files = {side: SentenceFile(folder.prefix(split, sides, side), len(dictionary)) for side in sides}
        counts = {len(file) for file in files.values()}
        if counts != {folder.manifest.counts[split][sides.name]}:
            what = f"{sorted(counts)} sentences in {split}.{sides.name}, of which the manifest has another number"
            raise DataError(what, str(folder.path), "run moe-prepare again")
        for offset, side in enumerate(sides):
            if side in by_language and _is_read(folder, sides, side, keys.sides):
                text = files[side] if block is None else PackedFile(files[side], max(1, block - 1))
                by_language[side].append(Piece((text,), (numbers[offset],), uid + offset * len(files[side])))
        both = tuple(files.values())
        if keys.translation_lm and split == "train" and len(both) == 2 and all(side in by_language for side in sides):
            pairs.append((sides.name, [Piece(both, numbers, uid + 2 * len(both[0]))]))
        uid += (3 if len(both) == 2 else 1) * len(both[0])  # each side's sentences, and pairs of them
    streams = [(name, pieces) for name, pieces in by_language.items() if pieces]
    if not streams:
        remedy = "set task.sides=both or other task.languages, or prepare text for it"
        raise DataError(
            f"the split '{split}' has no text to read (task.sides={keys.sides}) in {', '.join(wanted)}",
            str(folder.path),
            remedy,
        )
    return MonolingualText([*streams, *pairs], dictionary.bos(), dictionary.pad())


def languages_read(folder: DataFolder, split: str, keys: LanguageModelConfig) -> tuple[str, ...]:
    """The languages that :func:`open_text` finds text of in a split, sorted."""
    wanted = keys.languages or folder.languages
    sides = [(sides, side) for sides in folder.texts(split) for side in sides if side in wanted]
    return tuple(sorted({side for both, side in sides if _is_read(folder, both, side, keys.sides)}))


def _is_read(folder: DataFolder, sides: Sides, side: str, wanted: str) -> bool:
    """Whether ``task.sides`` reads the side, by the directions of the folder; single languages are always read."""
    if isinstance(sides, Single):
        return True
    other = sides.target if side == sides.source else sides.source
    names = {"target": (f"{other}-{side}",), "source": (f"{side}-{other}",)}
    return any(name in folder.directions for name in names.get(wanted, (f"{other}-{side}", f"{side}-{other}")))
