"""Beam search on the real model: dense and sparse, against fairseq on the same weights, and alone vs batched."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.config import ModelConfig, SearchConfig
from moe_train.evaluation.search import beam_search
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.models import build_model
from moe_train.routing import Router, Routing, RoutingContext, routing_config
from moe_train.routing.context import LocalReduction
from tests.evaluation.recurrent import dictionary

WORDS = dictionary(600)


def model(strategy: str, seed: int = 1) -> torch.nn.Module:
    config = ModelConfig(
        encoder_layers=2,
        decoder_layers=2,
        embed_dim=32,
        ffn_dim=64,
        num_heads=4,
        max_positions=48,
        sparse_layers="all",
        share_embeddings=False,
    )
    keys = {"name": strategy} if strategy == "dense" else {"name": strategy, "num_experts": 4}
    built = build_model(config, routing_config(keys), WORDS, WORDS, seed=seed).eval()
    with torch.no_grad():  # sharper than a fresh model, and apt to end: hypotheses differ in words and length
        built.decoder.output.weight.mul_(6.0)
        built.decoder.output.weight[WORDS.eos()].mul_(4.0)
    return built


def batch(lengths: list[int], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), WORDS.pad())
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(4, len(WORDS), (length - 1,), generator=generator)
        tokens[row, length - 1] = WORDS.eos()
    return {
        "src_tokens": tokens,
        "src_lengths": torch.tensor(lengths),
        "prev_output_tokens": torch.full((len(lengths), 1), WORDS.eos()),
        "sentence_uid": torch.arange(len(lengths)) * 31 + 5,
        "src_lang": torch.zeros(len(lengths), dtype=torch.int64),
        "tgt_lang": torch.ones(len(lengths), dtype=torch.int64),
    }


@pytest.mark.parametrize("strategy", ["dense", "switch", "thor"])
@pytest.mark.parametrize("beam", [1, 4])
def test_same_hypotheses_as_fairseq_on_the_same_weights(strategy: str, beam: int) -> None:
    from fairseq.sequence_generator import SequenceGenerator

    built, data = model(strategy), batch([9] * 5)
    theirs = SequenceGenerator([built], WORDS, beam_size=beam, max_len_a=1.5, max_len_b=5)
    expected = theirs.generate([built], {"net_input": data})
    found = BeamSearch(built, WORDS, SearchConfig(beam=beam, max_length_ratio=1.5, max_length_offset=5))(data)
    for row, hypotheses in enumerate(expected):
        assert found.best()[row] == hypotheses[0]["tokens"].tolist()[:-1]
        scores = torch.stack([h["score"] for h in hypotheses])
        torch.testing.assert_close(found.scores[row, : len(hypotheses)], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["dense", "switch", "thor", "random"])
def test_batch_mates_and_beams_change_no_routing(strategy: str) -> None:
    built, lengths = model(strategy), [12, 5, 9, 7]
    search = BeamSearch(built, WORDS, SearchConfig(beam=4, max_length_ratio=1.0, max_length_offset=6))
    data = batch(lengths)
    together = search(data).best()
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in data.items()}
        alone["src_tokens"] = alone["src_tokens"][:, :length]
        assert search(alone).best() == [together[row]]


def test_a_sentence_keeps_its_experts_through_the_search() -> None:
    """THOR's Dispatch(s): one expert per sentence and layer, whatever its beams do and whoever leaves the batch."""
    built, data = model("thor"), batch([12, 5, 9, 7, 11, 6])
    drawn: dict[tuple[int, int], set[int]] = {}
    steps = 0

    def note(_: torch.nn.Module, given: tuple[Tensor, RoutingContext], routing: Routing) -> None:
        nonlocal steps
        context, steps = given[1], steps + 1
        for uid, expert in zip(context.sentence_uid.tolist(), routing.choices[:, 0].tolist(), strict=True):
            drawn.setdefault((context.layer, uid), set()).add(expert)

    for module in built.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    BeamSearch(built, WORDS, SearchConfig(beam=4, max_length_ratio=1.0, max_length_offset=6))(data)
    assert steps > 4 * 5 and len(drawn) == 4 * 6  # four sparse layers, six sentences
    assert all(len(experts) == 1 for experts in drawn.values())
    for layer in range(4):
        assert len(set.union(*(drawn[layer, uid] for uid in data["sentence_uid"].tolist()))) > 1


def test_the_sentence_decides_random_routing() -> None:
    built, data = model("random"), batch([9] * 4)
    search = BeamSearch(built, WORDS, SearchConfig(beam=2, max_length_ratio=1.0))
    first = search(data)
    assert torch.equal(first.scores, search(data).scores)
    other = search({**data, "sentence_uid": data["sentence_uid"] + 1})
    assert not torch.equal(first.scores, other.scores)


def test_in_company_a_search_without_sentences_goes_on() -> None:
    """One that has none of its own, or is done, feeds no rows as long as others need its experts."""

    class Others(LocalReduction):
        left = 12

        def max(self, value: Tensor) -> Tensor:
            Others.left -= 1
            return value.clamp(min=int(Others.left > 0))

    built = model("switch")
    steps: list[int] = []
    original = built.decode_step
    built.decode_step = lambda tokens, state: (steps.append(tokens.shape[0]), original(tokens, state))[1]
    config = SearchConfig(beam=3, max_length_ratio=0.1, max_length_offset=4)
    empty = {name: value[:0] for name, value in batch([4, 4]).items()}
    assert BeamSearch(built, WORDS, config, Others())(empty).best() == []
    assert steps == [0] * 11
    alone = BeamSearch(built, WORDS, config)(batch([4, 4])).best()
    steps.clear()
    Others.left = 12
    assert BeamSearch(built, WORDS, config, Others())(batch([4, 4])).best() == alone
    assert len(steps) == 11 and steps[0] == 6 and steps[-1] == 0


def test_two_reads_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which torch's path is for, the host waits for each; none has ended and the cache is not compacted."""
    built, data, steps = model("dense"), batch([9] * 3), 7
    reads: list[str] = []
    monkeypatch.setattr(beam_search, "is_supported", lambda _: False)
    monkeypatch.setattr(type(built), "pack_decoder", lambda *_: None)

    def note(value: Tensor, name: str, original: Any, *given: Any, **keys: Any) -> Any:
        reads.append(name)
        return original(value, *given, **keys)

    for name in ("tolist", "__bool__", "item", "nonzero"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, functools.partialmethod(note, name, original))

    def count(longest: int) -> int:
        limits = {"max_length_ratio": 0.0, "max_length_offset": longest, "min_length": longest}
        reads.clear()
        BeamSearch(built, WORDS, SearchConfig(beam=4, **limits))(data)  # type: ignore[arg-type]
        return len(reads)

    assert count(steps) - count(steps - 1) == 2
