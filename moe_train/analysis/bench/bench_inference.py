"""Measures inference time of THOR and of the dense model of equal size: a forward pass, and a beam search.

THOR (Zuo et al., ICLR 2022) draws one expert per token or sentence, so that it has the FLOPs of the dense model, with
the rows of each sparse layer divided over E weights; or one expert of a layer serves everything. The models alternate
within a round, so that other load of the machine affects all of them. Searches of random models would end at random:
all hypotheses get the same length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.config import ModelConfig, SearchConfig
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.models import TransformerModel, build_model
from moe_train.models.fixed_experts import fix_experts
from moe_train.routing import routing_config

INFERENCE_MODES = ("fixed", "sentence", "token")
_PAD, _EOS, _UNK, _FIRST = 1, 2, 3, 4


@dataclass(frozen=True)
class DecodingWorkload:
    """Sizes of the batch that is timed.

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
    """One inference mode in one task.

    Attributes:
        task: ``forward`` (encoder and decoder over whole sentences) or ``search`` (a beam search).
        inference: ``fixed``: one expert of each layer for everything; ``sentence``: all its tokens share an expert;
            ``token``: each draws its own.
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
        """End symbol."""
        return _EOS

    def unk(self) -> int:
        """Unknown word."""
        return _UNK


def bench_inference(
    model: ModelConfig, num_experts: int, work: DecodingWorkload, rounds: int = 9
) -> list[InferenceRow]:
    """Times one batch size.

    Args:
        model: sizes of all models; its sparse layers are those of THOR.
        num_experts: E.
        work: the batch.
        rounds: number of timed runs of each model.
    """
    models = {"dense": _build(model, {"name": "dense"}, work)}
    for mode in INFERENCE_MODES:
        keys = {"name": "thor", "num_experts": num_experts, "inference": mode}
        models[mode] = _build(model, keys, work)
    rows = []
    for task, prepare in _TASKS.items():
        calls = {name: prepare(built, work) for name, built in models.items()}
        seconds = timed(calls, rounds)
        rows += [_row(task, mode, num_experts, work, seconds) for mode in INFERENCE_MODES]
    return rows


def _build(config: ModelConfig, routing: Mapping[str, Any], work: DecodingWorkload) -> TransformerModel:
    words = NumberedWords(work.vocabulary)
    built = build_model(config, routing_config(routing), words, words, seed=1)
    assert isinstance(built, TransformerModel)
    fix_experts(built)
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
    limits = {"max_length_ratio": 0.0, "max_length_offset": work.steps, "min_length": work.steps}
    config = SearchConfig(beam=work.beam, **limits)  # type: ignore[arg-type]
    search = BeamSearch(model, NumberedWords(work.vocabulary), config)
    return lambda: search(given)


_TASKS: Mapping[str, Callable[[TransformerModel, DecodingWorkload], Callable[[], object]]] = {
    "forward": _forward,
    "search": _search,
}


@torch.no_grad()
def timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a warm-up; every second round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _row(
    task: str, mode: str, num_experts: int, work: DecodingWorkload, seconds: Mapping[str, Sequence[float]]
) -> InferenceRow:
    pairs = zip(seconds[mode], seconds["dense"], strict=True)
    median = {"dense": statistics.median(seconds["dense"]) * 1e3, "thor": statistics.median(seconds[mode]) * 1e3}
    return InferenceRow(task, mode, work.sentences, num_experts, median, statistics.median(a / b for a, b in pairs))
