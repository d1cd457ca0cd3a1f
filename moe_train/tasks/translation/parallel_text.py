"""A split of a data folder as items: a sentence in a direction, with tags, languages and a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moe_train.config import TaskConfig
from moe_train.data.folder import DataFolder
from moe_train.data.text.pairs import Pair, tag
from moe_train.errors import DataError
from moe_train.tasks.base import Sample
from moe_train.tasks.indexed_dataset import SentenceFile

if TYPE_CHECKING:
    from fairseq.data import Dictionary

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Tags:
    """Tags of a direction's sentences.

    Attributes:
        source: dictionary id in front of the source, None where there is none.
        source_last: it stands after the source's end symbol instead.
        first: the decoder's first input token: the target language's tag, or the end of sentence as in plain fairseq.
            It is *in place of* the end, so the target has no tag: the model never has to predict a tag that is given,
            and a search starts from this one token. (NLLB feeds the end and then the tag: ``target``.)
        target: dictionary id in front of the target (the decoder reads the end symbol before it); None: there is none.
        source_language, target_language: numbers in the folder's sorted list of languages.
    """

    source: int | None
    first: int
    source_language: int
    target_language: int
    source_last: bool = False
    target: int | None = None

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """The tokens that a search starts from."""
        return (self.first,) if self.target is None else (self.first, self.target)

    def framed(self, ids: Sequence[int], end: int, longest: int) -> list[int]:
        """A source of at most ``longest`` tokens: ids (the last ones cut if there are too many), end symbol and tag."""
        mark = [] if self.source is None else [self.source]
        whole = [*ids[: longest - 1 - len(mark)], end]
        return whole + mark if self.source_last else mark + whole

    @classmethod
    def of(cls, direction: str, task: TaskConfig, languages: Sequence[str], dictionary: Dictionary) -> Tags:
        """The tags of ``en-de``.

        Raises:
            DataError: a language of the direction is not one of the folder's.
        """
        pair = Pair.parse(direction)
        for language in pair:
            if language not in languages or tag(language) not in dictionary.indices:
                raise DataError(
                    f"the data folder knows no language '{language}'", direction, f"choose from {', '.join(languages)}"
                )
        ids = {name: dictionary.index(tag(code)) for name, code in (("source", pair.source), ("target", pair.target))}
        target = ids.get(task.target_tag)
        after_end = task.target_tag_place == "after_end"
        return cls(
            source=ids.get(task.source_tag),
            first=dictionary.eos() if target is None or after_end else target,
            source_language=languages.index(pair.source),
            target_language=languages.index(pair.target),
            source_last=task.source_tag_place == "end",
            target=target if after_end else None,
        )


@dataclass(frozen=True)
class Direction:
    """One direction's files inside a split.

    Attributes:
        first_uid: number of its first sentence among all directions of the folder's split, chosen or not: a sentence
            has the same number in every run, by which random routing draws.
    """

    name: str
    source: SentenceFile
    target: SentenceFile
    tags: Tags
    first_uid: int

    def __len__(self) -> int:
        return len(self.target)


class ParallelText:
    """The items of some directions, one direction after the other.

    Attributes:
        sizes: items of each direction.
    """

    def __init__(self, directions: Sequence[Direction], pad: int) -> None:
        self.directions = tuple(directions)
        self.pad = pad
        self.sizes = [len(d) for d in self.directions]
        self._first = np.cumsum([0, *self.sizes])

    @cached_property
    def source_lengths(self) -> Indices:
        """[N] tokens of each item's source, tag and end included; 8 bytes each, kept once they have been asked for."""
        return _joined([d.source.sizes + (d.tags.source is not None) for d in self.directions])

    @cached_property
    def target_lengths(self) -> Indices:
        """[N] tokens of each item's target, its end included, and its tag, which it mostly has not."""
        return _joined([d.target.sizes + (d.tags.target is not None) for d in self.directions])

    def lengths(self, direction: int, sentences: slice | Indices) -> tuple[Indices, Indices]:
        """Tokens of the sources and targets of some sentences of a direction, tag and end included."""
        d = self.directions[direction]
        source, target = d.source.sizes_of(sentences), d.target.sizes_of(sentences)
        return source + (d.tags.source is not None), target + (d.tags.target is not None)

    def __len__(self) -> int:
        return int(self._first[-1])

    def sample(self, indices: Indices) -> Sample:
        """The batch of these items, right-padded, in fairseq's form (see :data:`moe_train.tasks.base.Sample`)."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = len(indices)
        which = np.searchsorted(self._first, indices, side="right") - 1
        numbers = np.unique(which).tolist()
        source_lengths, target_lengths = np.zeros((2, rows), np.int64)
        for number in numbers:
            here = np.flatnonzero(which == number)
            source_lengths[here], target_lengths[here] = self.lengths(number, indices[here] - self._first[number])
        source = np.full((rows, max(1, source_lengths.max(initial=0))), self.pad, np.int64)
        target = np.full((rows, max(1, target_lengths.max(initial=0))), self.pad, np.int64)
        first, uid, source_language, target_language = np.zeros((4, rows), np.int64)
        for number in numbers:
            direction, here = self.directions[number], np.flatnonzero(which == number)
            sentences = indices[here] - self._first[number]
            tags = direction.tags
            if tags.source is not None:
                source[here, source_lengths[here] - 1 if tags.source_last else 0] = tags.source
            in_front = tags.source is not None and not tags.source_last
            direction.source.fill(source, here, sentences, column=int(in_front))
            if tags.target is not None:
                target[here, 0] = tags.target
            direction.target.fill(target, here, sentences, column=int(tags.target is not None))
            first[here], uid[here] = tags.first, direction.first_uid + sentences
            source_language[here], target_language[here] = tags.source_language, tags.target_language
        tokens = int(target_lengths.sum())
        return {
            "id": torch.from_numpy(indices),
            "nsentences": rows,
            "ntokens": tokens,
            "real_tokens": [int(source_lengths.sum()), tokens],
            "real_targets": tokens,
            "target": torch.from_numpy(target),
            "net_input": {
                "src_tokens": torch.from_numpy(source),
                "src_lengths": torch.from_numpy(source_lengths),
                "prev_output_tokens": torch.from_numpy(shifted(target, target_lengths, first, self.pad)),
                "sentence_uid": torch.from_numpy(uid),
                "src_lang": torch.from_numpy(source_language),
                "tgt_lang": torch.from_numpy(target_language),
            },
        }


def shifted(target: Indices, lengths: Indices, first: Indices, pad: int) -> Indices:
    """The decoder's input [B, T]: ``first`` [B], then the target without its end.

    Args:
        target: [B, T], right-padded, each row's last token being the end.
        lengths: [B] tokens of each row.
    """
    previous = np.empty_like(target)
    previous[:, 1:] = target[:, :-1]
    previous[:, 0] = first
    shorter = np.flatnonzero(lengths < target.shape[1])
    previous[shorter, lengths[shorter]] = pad  # the end of a row that is not the longest
    return previous


def open_split(
    folder: DataFolder, split: str, chosen: Sequence[str], task: TaskConfig, dictionary: Dictionary
) -> ParallelText:
    """Opens the chosen directions of a split; those without sentences in the split are left out."""
    files: dict[str, SentenceFile] = {}  # a pair stored once serves both directions

    def opened(prefix: Path) -> SentenceFile:
        if prefix.name not in files:
            files[prefix.name] = SentenceFile(prefix, len(dictionary))
        return files[prefix.name]

    directions, uid = [], 0
    for name in folder.directions_of(split):
        pair = folder.pair_files(split, name)
        if name in chosen:
            source, target = opened(pair.source), opened(pair.target)
            if not len(source) == len(target) == pair.sentences:
                raise DataError(
                    f"{len(source)} source and {len(target)} target sentences in {split}.{pair.pair}, of which the "
                    f"manifest has {pair.sentences}",
                    str(folder.path),
                    "run moe-prepare again",
                )
            tags = Tags.of(name, task, folder.languages, dictionary)
            directions.append(Direction(name, source, target, tags, uid))
        uid += pair.sentences
    return ParallelText(directions, dictionary.pad())


def _joined(parts: Sequence[Indices]) -> Indices:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
