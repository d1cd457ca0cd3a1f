"""Translates text: sorts sentences by length, makes batches by tokens, searches and detokenises."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_train.config import SearchConfig
from moe_train.evaluation.routed_tokens import collect_routing
from moe_train.evaluation.search.beam_search import BeamSearch, DecodableModel
from moe_train.evaluation.search.target_scores import padded, token_log_probabilities
from moe_train.evaluation.translations import EMPTY, Batch, BatchResult, Hypothesis, Translation
from moe_train.routing.context import RankReduction
from moe_train.tasks.base import TranslatingTask

_TAG_AND_END = 2  # a tag and the end symbol, at most
_LOGITS = 2**26  # of a batch that is scored: 256 MiB
_LINE_ENDS = {ord(c): " " for c in "\r\n"}


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


def encode(
    task: TranslatingTask,
    lines: Sequence[str],
    source: str,
    target: str,
    batch_tokens: int,
    prefixes: Sequence[str] = (),
    targets: Sequence[Sequence[int]] | None = None,
) -> EncodedLines:
    """Encodes lines of one direction and divides them into batches.

    Args:
        prefixes: a text for each line with which its translation begins; empty: none.
        targets: ids of a translation of each line, without tag and end; blank lines are encoded then, too.
    """
    tokenizer, (longest, longest_target) = task.folder.tokenizer(), task.max_positions()
    room, target_room = task.source_room(f"{source}-{target}"), longest_target - 1
    filled = [n for n, line in enumerate(lines) if targets is not None or line.strip()]
    ids = [tuple(tokenizer.encode(lines[n])) for n in filled]
    forced = [tuple(tokenizer.encode(prefixes[n])) for n in filled] if any(prefixes) else []
    given = [] if targets is None else [tuple(targets[n]) for n in filled]
    lengths = [min(len(i) + _TAG_AND_END, longest) for i in ids]
    truncated = {n for n, own in zip(filled, ids, strict=True) if len(own) > room}
    if targets is not None:
        truncated |= {n for n, own in zip(filled, given, strict=True) if len(own) > target_room}
        given = [own[:target_room] for own in given]
        lengths = [max(length, len(own) + 1) for length, own in zip(lengths, given, strict=True)]
        batch_tokens = min(batch_tokens, max(1, _LOGITS // len(task.target_dictionary)))
    grouped = length_batches(lengths, batch_tokens)
    batches = tuple(
        Batch(
            source,
            target,
            tuple(ids[i] for i in batch),
            tuple(sentence_uid(lines[filled[i]]) for i in batch),
            tuple(forced[i] for i in batch) if forced else (),
            None if targets is None else tuple(given[i] for i in batch),
        )
        for batch in grouped
    )
    numbers = tuple(tuple(filled[i] for i in batch) for batch in grouped)
    return EncodedLines(batches, numbers, len(lines), tuple(sorted(truncated)))


class Translator:
    """Translates batches with one model on one device.

    Args:
        task: has tags, dictionary and tokenizer.
        model: already on ``device``.
        search: settings of beam search.
        device: to which batches are moved.
        group: ranks that share the model's experts and search at the same time; see :class:`BeamSearch`.
        token_scores: whether hypotheses have token scores.
    """

    def __init__(
        self,
        task: TranslatingTask,
        model: DecodableModel,
        search: SearchConfig,
        device: torch.device | str = "cpu",
        group: RankReduction | None = None,
        token_scores: bool = False,
    ) -> None:
        self.task, self.config, self.device, self.token_scores = task, search, torch.device(device), token_scores
        self._model = model
        self._search = BeamSearch(model, task.target_dictionary, search, group)

    def with_settings(self, search: SearchConfig, token_scores: bool = False) -> Translator:
        """A translator with the same model and other settings."""
        other = copy.copy(self)
        other.config, other.token_scores, other._search = search, token_scores, self._search.with_config(search)
        return other

    def run(self, batch: Batch) -> BatchResult:
        """Translates one batch, or scores its targets."""
        start = time.perf_counter()
        net_input = self.net_input(batch)
        with collect_routing(self._model) as counted:
            if batch.targets is None:
                translations = self._translate(net_input, batch.prefixes)
            else:
                translations = self._score(net_input, batch.targets)
        return BatchResult(translations, time.perf_counter() - start, counted().to_json())

    def net_input(self, batch: Batch) -> dict[str, Any]:
        """The model's input for a batch, on the device."""
        sample = self.task.inference_sample(batch.sentences, batch.source, batch.target, batch.uids)
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in sample["net_input"].items()}

    def _translate(self, net_input: Mapping[str, Any], prefixes: Sequence[Sequence[int]]) -> tuple[Translation, ...]:
        forced = padded(prefixes, self.task.target_dictionary.pad(), self.device) if any(prefixes) else None
        found = self._search(net_input, forced, self.token_scores).lists(self.config.n_best)
        hypotheses = [[self._hypothesis(*one) for one in own] for own in found]
        return tuple(Translation(**vars(best), others=tuple(others)) for best, *others in hypotheses)

    def _score(self, net_input: Mapping[str, Any], targets: Sequence[Sequence[int]]) -> tuple[Translation, ...]:
        scores = token_log_probabilities(self._model, net_input, targets, self.task.target_dictionary)
        found = (self._hypothesis(ids, sum(own), own) for ids, own in zip(targets, scores, strict=True))
        return tuple(Translation(**vars(one)) for one in found)

    def _hypothesis(self, ids: Sequence[int], score: float, token_scores: Sequence[float]) -> Hypothesis:
        text = self.task.folder.tokenizer().decode(ids).translate(_LINE_ENDS)
        dictionary = self.task.target_dictionary
        pieces = tuple(dictionary[i] for i in (*ids, dictionary.eos()))
        return Hypothesis(text, round(score, 6), len(pieces), pieces, tuple(round(one, 6) for one in token_scores))

    def translate(
        self,
        lines: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        prefixes: Sequence[str] = (),
    ) -> list[Translation]:
        """Translates lines of one direction.

        Args:
            progress: called with the number of sentences done after each batch.
            prefixes: as in :func:`encode`.
        """
        encoded = encode(self.task, lines, source, target, self.config.batch_tokens, prefixes)
        return encoded.to_lines(self.run_all(encoded, progress))

    def run_all(self, encoded: EncodedLines, progress: Callable[[int], None] | None = None) -> list[BatchResult]:
        """The results of all batches; ``progress`` as in :meth:`translate`."""
        outcomes = []
        for batch in encoded.batches:
            outcomes.append(self.run(batch))
            if progress:
                progress(len(batch.sentences))
        return outcomes
