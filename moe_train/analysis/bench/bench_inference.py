"""What THOR costs at inference beside the dense model of equal sizes: a forward pass, and a beam search.

THOR (Zuo et al., ICLR 2022) draws one expert per token or sentence, so that it computes what the dense model computes,
with the rows of each sparse layer divided over E weights instead of one. Contenders have the same sizes and take turns
within a round, so that what else the machine does hits all of them. Searches of random models would end at random: the
end symbol is kept out of reach, so that all hypotheses of all contenders have the same length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.config import ModelConfig, SearchConfig
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.models import TransformerModel, build_model
from moe_train.routing import routing_config

WAYS = ("sentence", "token")
_PAD, _EOS, _UNK, _FIRST = 1, 2, 3, 4
_UNLIKELY = -1e4  # a logit


@dataclass(frozen=True)
class DecodingWorkload:
    """What is timed.

    Attributes:
        sentences: of a batch.
        length: source tokens of each, and target tokens of each in the forward pass.
        beam: hypotheses per sentence in the search.
        steps: tokens of every hypothesis.
        vocabulary: words.
    """

    sentences: int = 32
    length: int = 24
    beam: int = 4
    steps: int = 16
    vocabulary: int = 8000


@dataclass(frozen=True)
class InferenceRow:
    """One way to draw experts, in one task.

    Attributes:
        task: ``forward`` (encoder and decoder over whole sentences) or ``search`` (a beam search).
        inference: who shares an expert.
        milliseconds: median times of ``dense`` and ``thor``.
        ratio: THOR's time over the dense model's: the median over rounds of the ratio within a round.
    """

    task: str
    inference: str
    sentences: int
    num_experts: int
    milliseconds: Mapping[str, float]
    ratio: float


class NumberedWords:
    """A vocabulary of n words with fairseq's first symbols."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        """Padding."""
        return _PAD

    def eos(self) -> int:
        """The end."""
        return _EOS

    def unk(self) -> int:
        """An unknown word."""
        return _UNK


def bench_inference(
    model: ModelConfig, num_experts: int, work: DecodingWorkload, rounds: int = 9
) -> list[InferenceRow]:
    """Times one batch size.

    Args:
        model: sizes of all contenders; its sparse layers are THOR's.
        num_experts: E.
        work: the batch.
        rounds: how often each contender runs.
    """
    models = {"dense": _build(model, {"name": "dense"}, work)}
    for way in WAYS:
        keys = {"name": "thor", "num_experts": num_experts, "inference": way}
        models[way] = _build(model, keys, work)
    rows = []
    for task, prepare in _TASKS.items():
        calls = {name: prepare(built, work) for name, built in models.items()}
        seconds = timed(calls, rounds)
        rows += [_row(task, way, num_experts, work, seconds) for way in WAYS]
    return rows


def _build(config: ModelConfig, routing: Mapping[str, Any], work: DecodingWorkload) -> TransformerModel:
    words = NumberedWords(work.vocabulary)
    built = build_model(config, routing_config(routing), words, words, seed=1)
    assert isinstance(built, TransformerModel)
    return built.eval()


def _batch(work: DecodingWorkload) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (work.sentences, work.length)
    return {
        "src_tokens": torch.randint(_FIRST, work.vocabulary, shape, generator=generator),
        "src_lengths": torch.full((work.sentences,), work.length),
        "prev_output_tokens": torch.randint(_FIRST, work.vocabulary, shape, generator=generator),
        "sentence_uid": torch.arange(work.sentences) * 31 + 5,
    }


def _forward(model: TransformerModel, work: DecodingWorkload) -> Callable[[], object]:
    given = _batch(work)
    return lambda: model(**given)


def _search(model: TransformerModel, work: DecodingWorkload) -> Callable[[], object]:
    given = _batch(work)
    given["prev_output_tokens"] = torch.full((work.sentences, 1), _EOS)
    step = model.decode_step

    def endless(tokens: Tensor, state: Any) -> Tensor:
        logits = step(tokens, state)
        logits[:, _EOS] = _UNLIKELY
        return logits

    model.decode_step = endless  # type: ignore[method-assign]
    config = SearchConfig(beam=work.beam, max_length_ratio=1e-9, max_length_offset=work.steps)
    search = BeamSearch(model, NumberedWords(work.vocabulary), config)
    return lambda: search(given)


_TASKS: Mapping[str, Callable[[TransformerModel, DecodingWorkload], Callable[[], object]]] = {
    "forward": _forward,
    "search": _search,
}


@torch.no_grad()
def timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that does not count; every second round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in _turns(calls, number):
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _turns(calls: Mapping[str, Callable[[], object]], number: int) -> Iterator[tuple[str, Callable[[], object]]]:
    items = list(calls.items())
    yield from items if number % 2 else reversed(items)


def _row(
    task: str, way: str, num_experts: int, work: DecodingWorkload, seconds: Mapping[str, Sequence[float]]
) -> InferenceRow:
    pairs = zip(seconds[way], seconds["dense"], strict=True)
    median = {"dense": statistics.median(seconds["dense"]) * 1e3, "thor": statistics.median(seconds[way]) * 1e3}
    return InferenceRow(task, way, work.sentences, num_experts, median, statistics.median(a / b for a, b in pairs))
