"""Translates text: sorts sentences by length, makes batches by tokens, searches and detokenises."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_train.config import SearchConfig
from moe_train.evaluation.routed_tokens import collect_routing
from moe_train.evaluation.search.beam_search import BeamSearch, DecodableModel
from moe_train.routing.context import RankReduction
from moe_train.tasks.base import TranslatingTask

_TAG_AND_END = 2  # a tag and the end symbol, at most
_LINE_ENDS = {ord(c): " " for c in "\r\n"}


@dataclass(frozen=True)
class Batch:
    """A batch to translate, as plain values for another process: dictionary ids without tags and end symbol."""

    source: str
    target: str
    sentences: tuple[tuple[int, ...], ...]
    uids: tuple[int, ...]


@dataclass(frozen=True)
class Translation:
    """One line: its text, its score (log-probability over length^penalty) and its tokens, end symbol included.

    ``cut``: the source was longer than the model's longest and was truncated.
    """

    text: str
    score: float
    tokens: int
    cut: bool = False


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch: a translation per sentence, and the seconds that it took.

    Attributes:
        routing: routing statistics of sources and of all hypotheses that were considered, as plain values.
    """

    translations: tuple[Translation, ...]
    seconds: float
    routing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BatchResult:
        """The inverse of :func:`dataclasses.asdict`, after conversion to JSON and back."""
        translations = tuple(Translation(**one) for one in content["translations"])
        return cls(translations, content["seconds"], content["routing"])


EMPTY = Translation("", 0.0, 0)


def sentence_uid(text: str) -> int:
    """A hash of the sentence's text, so that random routing does not depend on the other sentences of its batch."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices sorted by length, longest first, in batches of at most ``batch_tokens`` tokens, padding included.

    A longer sentence is a batch of its own. The batches depend only on the lengths, not on the number of processes.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else None
        if current is None or (len(current) + 1) * lengths[current[0]] > batch_tokens:
            batches.append(current := [])
        current.append(index)
    return batches


@dataclass(frozen=True)
class EncodedLines:
    """Encoded lines in batches.

    Attributes:
        batches: the batches. Blank lines are in none.
        lines: for each batch, the line number (from 0) of each sentence.
        total: number of lines.
        truncated: line numbers of lines that are longer than the model's longest source.
    """

    batches: tuple[Batch, ...]
    lines: tuple[tuple[int, ...], ...]
    total: int
    truncated: tuple[int, ...] = ()

    def to_lines(self, outcomes: Sequence[BatchResult]) -> list[Translation]:
        """One translation per line, in the order of the lines; blank for blank lines."""
        result = [EMPTY] * self.total
        for lines, outcome in zip(self.lines, outcomes, strict=True):
            for line, translation in zip(lines, outcome.translations, strict=True):
                result[line] = translation
        for line in self.truncated:
            result[line] = replace(result[line], cut=True)
        return result


def encode(task: TranslatingTask, lines: Sequence[str], source: str, target: str, batch_tokens: int) -> EncodedLines:
    """Encodes lines of one direction and divides them into batches."""
    tokenizer, longest = task.folder.tokenizer(), task.max_positions()[0]
    filled = [n for n, line in enumerate(lines) if line.strip()]
    ids = [tuple(tokenizer.encode(lines[n])) for n in filled]
    lengths = [min(len(i) + _TAG_AND_END, longest) for i in ids]
    grouped = length_batches(lengths, batch_tokens)
    batches = tuple(
        Batch(source, target, tuple(ids[i] for i in batch), tuple(sentence_uid(lines[filled[i]]) for i in batch))
        for batch in grouped
    )
    room = task.source_room(f"{source}-{target}")
    truncated = tuple(n for n, pieces in zip(filled, ids, strict=True) if len(pieces) > room)
    return EncodedLines(batches, tuple(tuple(filled[i] for i in batch) for batch in grouped), len(lines), truncated)


class Translator:
    """Translates batches with one model on one device.

    Args:
        task: has tags, dictionary and tokenizer.
        model: already on ``device``.
        search: settings of beam search.
        device: to which batches are moved.
        group: ranks that share the model's experts and search at the same time; see :class:`BeamSearch`.
    """

    def __init__(
        self,
        task: TranslatingTask,
        model: DecodableModel,
        search: SearchConfig,
        device: torch.device | str = "cpu",
        group: RankReduction | None = None,
    ) -> None:
        self.task, self.config, self.device = task, search, torch.device(device)
        self._model = model
        self._search = BeamSearch(model, task.target_dictionary, search, group)

    def run(self, batch: Batch) -> BatchResult:
        """Translates one batch."""
        start = time.perf_counter()
        sample = self.task.inference_sample(batch.sentences, batch.source, batch.target, batch.uids)
        net_input = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in sample["net_input"].items()}
        with collect_routing(self._model) as counted:
            found = self._search(net_input)
        tokenizer = self.task.folder.tokenizer()
        translations = tuple(
            Translation(tokenizer.decode(ids).translate(_LINE_ENDS), round(score, 6), len(ids) + 1)
            for ids, score in zip(found.best(), found.best_scores(), strict=True)
        )
        return BatchResult(translations, time.perf_counter() - start, counted().to_json())

    def translate(
        self, lines: Sequence[str], source: str, target: str, progress: Callable[[int], None] | None = None
    ) -> list[Translation]:
        """Translates lines of one direction.

        Args:
            progress: called with the number of sentences done after each batch.
        """
        encoded = encode(self.task, lines, source, target, self.config.batch_tokens)
        outcomes = []
        for batch in encoded.batches:
            outcomes.append(self.run(batch))
            if progress:
                progress(len(batch.sentences))
        return encoded.to_lines(outcomes)
