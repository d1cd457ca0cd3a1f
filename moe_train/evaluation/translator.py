"""Text to text with a model: sentences are sorted by length, cut into batches by tokens, searched and detokenised."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_train.config import SearchConfig
from moe_train.evaluation.routed_tokens import counting
from moe_train.evaluation.search.beam_search import BeamSearch, DecodableModel
from moe_train.routing.context import RankReduction
from moe_train.tasks.base import TranslatingTask

_FRAME = 2  # a tag and the end symbol, at most
_LINE_ENDS = {ord(c): " " for c in "\r\n"}


@dataclass(frozen=True)
class Job:
    """A batch to translate, small enough to travel to another process: dictionary ids without tags and end."""

    source: str
    target: str
    sentences: tuple[tuple[int, ...], ...]
    uids: tuple[int, ...]


@dataclass(frozen=True)
class Translation:
    """One line: its text, its score (log-probability over length^penalty) and its tokens, end symbol included.

    ``cut``: the source was longer than the model's longest, and its tail is not translated.
    """

    text: str
    score: float
    tokens: int
    cut: bool = False


@dataclass(frozen=True)
class JobResult:
    """A job done: a translation per sentence, and the seconds that it took.

    Attributes:
        routing: what routers counted of sources and of all hypotheses that were tried, as plain values.
    """

    translations: tuple[Translation, ...]
    seconds: float
    routing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> JobResult:
        """The inverse of :func:`dataclasses.asdict`, after a journey as JSON."""
        translations = tuple(Translation(**one) for one in content["translations"])
        return cls(translations, content["seconds"], content["routing"])


EMPTY = Translation("", 0.0, 0)


def sentence_uid(text: str) -> int:
    """A number for a sentence that its text alone decides, so that random routing does not depend on its neighbours."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices sorted by length, longest first, in batches of at most ``batch_tokens`` tokens, padding included.

    A sentence that is longer than that stands alone. The batches depend on the lengths only, not on who decodes them.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else None
        if current is None or (len(current) + 1) * lengths[current[0]] > batch_tokens:
            batches.append(current := [])
        current.append(index)
    return batches


@dataclass(frozen=True)
class Encoded:
    """Lines made ready: ``jobs`` and, for each, the ``lines`` that its sentences are; blank lines are in no job.

    ``truncated``: the lines, by their numbers from 0, beyond the model's longest source, which lose their tails.
    """

    jobs: tuple[Job, ...]
    lines: tuple[tuple[int, ...], ...]
    total: int
    truncated: tuple[int, ...] = ()

    def assemble(self, outcomes: Sequence[JobResult]) -> list[Translation]:
        """One translation per line, in the order of the lines; blank ones stay blank."""
        result = [EMPTY] * self.total
        for lines, outcome in zip(self.lines, outcomes, strict=True):
            for line, translation in zip(lines, outcome.translations, strict=True):
                result[line] = translation
        for line in self.truncated:
            result[line] = replace(result[line], cut=True)
        return result


def encode(task: TranslatingTask, lines: Sequence[str], source: str, target: str, batch_tokens: int) -> Encoded:
    """Cuts lines of one direction into jobs."""
    tokenizer, longest = task.folder.tokenizer(), task.max_positions()[0]
    filled = [n for n, line in enumerate(lines) if line.strip()]
    ids = [tuple(tokenizer.encode(lines[n])) for n in filled]
    lengths = [min(len(i) + _FRAME, longest) for i in ids]
    batches = length_batches(lengths, batch_tokens)
    jobs = tuple(
        Job(source, target, tuple(ids[i] for i in batch), tuple(sentence_uid(lines[filled[i]]) for i in batch))
        for batch in batches
    )
    room = task.source_room(f"{source}-{target}")
    truncated = tuple(n for n, pieces in zip(filled, ids, strict=True) if len(pieces) > room)
    return Encoded(jobs, tuple(tuple(filled[i] for i in batch) for batch in batches), len(lines), truncated)


class Translator:
    """Translates jobs with one model on one device.

    Args:
        task: gives tags, dictionary and tokenizer.
        model: moved by its owner; only used here.
        search: beam search's settings.
        device: where batches go.
        company: ranks that hold some of the model's experts and search at the same time; see :class:`BeamSearch`.
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

    def run(self, job: Job) -> JobResult:
        """Translates one batch."""
        start = time.perf_counter()
        sample = self.task.inference_sample(job.sentences, job.source, job.target, job.uids)
        net_input = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in sample["net_input"].items()}
        with counting(self._model) as counted:
            found = self._search(net_input)
        tokenizer = self.task.folder.tokenizer()
        translations = tuple(
            Translation(tokenizer.decode(ids).translate(_LINE_ENDS), round(score, 6), len(ids) + 1)
            for ids, score in zip(found.best(), found.best_scores(), strict=True)
        )
        return JobResult(translations, time.perf_counter() - start, counted().to_json())

    def translate(
        self, lines: Sequence[str], source: str, target: str, progress: Callable[[int], None] | None = None
    ) -> list[Translation]:
        """Translates lines of one direction.

        Args:
            progress: called with the number of sentences done after each batch.
        """
        encoded = encode(self.task, lines, source, target, self.config.batch_tokens)
        outcomes = []
        for job in encoded.jobs:
            outcomes.append(self.run(job))
            if progress:
                progress(len(job.sentences))
        return encoded.assemble(outcomes)
