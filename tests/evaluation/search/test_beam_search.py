"""Beam search against exhaustive search, against fairseq's SequenceGenerator, and its own invariants."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_train.config import SearchConfig
from moe_train.errors import CheckpointError, ConfigError
from moe_train.evaluation.search.beam_search import BeamSearch
from tests.evaluation.recurrent import Recurrent

LENGTHS = [9, 4, 7, 7, 12, 3]


def search(model: Recurrent, net_input: dict[str, torch.Tensor], **config: Any) -> list[list[int]]:
    return BeamSearch(model, model.words, SearchConfig(**config))(net_input).best()


def sequence_log_prob(model: Recurrent, source: torch.Tensor, tokens: list[int]) -> float:
    """Summed log-probability of tokens and the end symbol, by one forward pass."""
    eos = model.words.eos()
    inputs, targets = torch.tensor([[eos, *tokens]]), torch.tensor([*tokens, eos])
    with torch.no_grad():
        encoded = model.encoder(source.unsqueeze(0))
        log_probs = model.decoder(inputs, encoder_out=encoded)[0].log_softmax(-1)[0]
    return float(log_probs[torch.arange(len(targets)), targets].sum())


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.5])
def test_a_wide_beam_is_exhaustive(penalty: float) -> None:
    symbols, longest = 6, 3  # <s>, <pad>, </s>, <unk> and two words: no more than 3 words that are not the end
    model = Recurrent(symbols, eos_bias=-1.0)
    batch = model.sample([5, 5, 5])
    words = [s for s in range(symbols) if s not in (model.words.pad(), model.words.eos())]
    beam = len(words) ** longest  # never prunes; the vocabulary caps `beam`, so set it past the cap
    finder = BeamSearch(
        model, model.words, SearchConfig(length_penalty=penalty, max_length_ratio=1e-6, max_length_offset=longest)
    )
    finder.beam = beam
    found = finder(batch)
    for row in range(3):
        scored = {}
        for length in range(1, longest + 1):
            for tokens in itertools.product(words, repeat=length):
                total = sequence_log_prob(model, batch["src_tokens"][row], list(tokens))
                scored[tokens] = total / (length + 1) ** penalty
        ranked = sorted(scored, key=lambda t: -scored[t])
        assert tuple(found.best()[row]) == ranked[0]
        assert found.best_scores()[row] == pytest.approx(scored[ranked[0]], abs=1e-5)


@pytest.mark.parametrize("symbols", [9, 40, 900])
@pytest.mark.parametrize("beam", [1, 4, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.6])
def test_same_hypotheses_as_fairseq(symbols: int, beam: int, penalty: float) -> None:
    from fairseq.sequence_generator import SequenceGenerator

    for seed in range(4):
        model = Recurrent(symbols, eos_bias=seed - 1.0, seed=seed).eval()
        batch = model.sample([8] * 6, seed)  # equal lengths: there fairseq's length limit is ours
        theirs = SequenceGenerator(
            [model], model.words, beam_size=beam, max_len_a=1.5, max_len_b=5, len_penalty=penalty
        )
        expected = theirs.generate([model], {"net_input": batch})
        ours = BeamSearch(
            model,
            model.words,
            SearchConfig(beam=beam, length_penalty=penalty, max_length_ratio=1.5, max_length_offset=5),
        )(batch)
        for row, hypotheses in enumerate(expected):
            found = [t[:n].tolist() for t, n in zip(ours.tokens[row], ours.lengths[row], strict=True)]
            assert found[: len(hypotheses)] == [h["tokens"].tolist()[:-1] for h in hypotheses]
            scores = torch.stack([h["score"] for h in hypotheses])
            torch.testing.assert_close(ours.scores[row, : len(hypotheses)], scores, rtol=1e-5, atol=1e-5)
            assert ours.scores[row, len(hypotheses) :].eq(-torch.inf).all()


@pytest.mark.parametrize("beam", [1, 5])
def test_batch_mates_change_nothing(beam: int) -> None:
    model = Recurrent(50).double()  # one row and many round differently: in fp32 that may decide a near tie
    batch = model.sample(LENGTHS)
    together = search(model, batch, beam=beam)
    for row, length in enumerate(LENGTHS):
        alone = {"src_tokens": batch["src_tokens"][row : row + 1, :length], "prev_output_tokens": torch.tensor([[2]])}
        assert search(model, alone, beam=beam) == [together[row]]


def test_rows_shrink_as_sentences_finish() -> None:
    model = Recurrent(50, eos_bias=1.0)
    finder = BeamSearch(model, model.words, SearchConfig(beam=3))
    hypotheses = finder(model.sample(LENGTHS))
    rows = model.rows_per_step
    assert rows[0] == 3 * len(LENGTHS)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    assert all(n % 3 == 0 for n in rows)
    assert (hypotheses.scores > -torch.inf).all()


def test_greedy_is_the_argmax() -> None:
    model = Recurrent(30)
    batch = model.sample([6, 6])
    found = search(model, batch, beam=1, max_length_offset=8)
    for row, tokens in enumerate(found):
        source = batch["src_tokens"][row].unsqueeze(0)
        inputs = torch.tensor([[model.words.eos(), *tokens]])
        with torch.no_grad():
            logits = model.decoder(inputs, encoder_out=model.encoder(source))[0][0]
        logits[:, model.words.pad()] = -torch.inf
        logits[0, model.words.eos()] = -torch.inf
        best = logits.argmax(-1).tolist()
        assert tokens == best[: len(tokens)]
        assert best[len(tokens)] == model.words.eos() or len(tokens) == 6 * 2 + 8


def test_longest_length_follows_the_own_source() -> None:
    model = Recurrent(30, eos_bias=-100.0)
    found = search(model, model.sample([9, 4]), beam=2, max_length_ratio=1.5, max_length_offset=2)
    assert [len(t) for t in found] == [15, 8]
    assert [len(t) for t in search(model, model.sample([60]), beam=2)] == [63], "a decoder of 64 positions"


def test_never_empty_never_padding() -> None:
    model = Recurrent(30, eos_bias=100.0)
    with torch.no_grad():
        model.decoder.out.bias[model.words.pad()] += 200.0
    found = search(model, model.sample(LENGTHS), beam=4)
    assert all(len(t) == 1 for t in found)
    assert all(model.words.pad() not in t for t in found)


@pytest.mark.parametrize("beam", [1, 4])
def test_forced_prefix_starts_the_decoder_and_is_not_scored(beam: int) -> None:
    model = Recurrent(40)
    config = SearchConfig(beam=beam)
    finder = BeamSearch(model, model.words, config)
    free = finder(model.sample([7, 5]))
    forced = finder(model.sample([7, 5], prefix=[2, 11]))
    assert model.rows_per_step[:2] == [2 * beam] * 2
    source = model.sample([7, 5])["src_tokens"]
    for row, tokens in enumerate(forced.best()):
        assert tokens != free.best()[row]
        inputs, targets = torch.tensor([[2, 11, *tokens]]), torch.tensor([*tokens, 2])
        with torch.no_grad():
            encoded = model.encoder(source[row : row + 1])
            log_probs = model.decoder(inputs, encoder_out=encoded)[0].log_softmax(-1)[0, 1:]
        mean = float(log_probs[torch.arange(len(targets)), targets].mean())
        assert forced.best_scores()[row] == pytest.approx(mean, abs=1e-5)


def test_no_sentences() -> None:
    model = Recurrent(30)
    empty = {
        "src_tokens": torch.zeros(0, 1, dtype=torch.long),
        "prev_output_tokens": torch.zeros(0, 1, dtype=torch.long),
    }
    assert search(model, empty) == []


def test_a_diverged_model_is_named() -> None:
    model = Recurrent(30)
    with torch.no_grad():
        model.decoder.out.weight[7] = torch.nan
    with pytest.raises(CheckpointError, match="not a number"):
        search(model, model.sample([4]))


def test_training_mode_comes_back() -> None:
    model = Recurrent(30).train()
    search(model, model.sample([4]))
    assert model.training


@pytest.mark.parametrize(
    "keys",
    [
        {"max_length_ratio": 0.0, "max_length_offset": 6},
        {"max_length_ratio": 0.29, "max_length_offset": 4, "min_length": 4},  # int(0.29 * 100) is 28
        {"max_length_ratio": 0.0, "max_length_offset": 200, "min_length": 0},
        {"max_length_ratio": 1.5, "max_length_offset": 0, "min_length": 7},
        {"max_length_ratio": 1.5, "max_length_offset": 5, "unk_penalty": 3.0},
        {"max_length_ratio": 0.0, "max_length_offset": 9, "unk_penalty": -4.5, "min_length": 3},
    ],
    ids=lambda keys: ",".join(f"{key}={value}" for key, value in keys.items()),
)
@pytest.mark.parametrize("beam", [1, 4])
def test_limits_and_penalties_are_fairseq_s(keys: dict[str, Any], beam: int) -> None:
    from fairseq.sequence_generator import SequenceGenerator

    short, unknown = 0, 0
    for seed in range(4):
        model = Recurrent(30, eos_bias=2.0 - seed, seed=seed).eval()
        with torch.no_grad():
            model.decoder.out.bias[model.words.unk()] += 3.0
        batch = model.sample([100 if keys["max_length_ratio"] == 0.29 else 8] * 6, seed)
        names = {"max_length_ratio": "max_len_a", "max_length_offset": "max_len_b", "min_length": "min_len"}
        given = {names.get(key, key): value for key, value in keys.items()}
        theirs = SequenceGenerator([model], model.words, beam_size=beam, **given).generate(
            [model], {"net_input": batch}
        )
        ours = BeamSearch(model, model.words, SearchConfig(beam=beam, **keys))(batch)
        for row, hypotheses in enumerate(theirs):
            found = [t[:n].tolist() for t, n in zip(ours.tokens[row], ours.lengths[row], strict=True)]
            assert found[: len(hypotheses)] == [h["tokens"].tolist()[:-1] for h in hypotheses]
            scores = torch.stack([h["score"] for h in hypotheses])
            torch.testing.assert_close(ours.scores[row, : len(hypotheses)], scores, rtol=1e-5, atol=1e-5)
            short += sum(len(tokens) < keys.get("min_length", 1) for tokens in found[: len(hypotheses)])
            unknown += sum(tokens.count(model.words.unk()) for tokens in found)
    assert not short
    assert unknown > 0 or keys.get("unk_penalty", 0.0) > 0


def test_a_huge_ratio_is_the_model_s_own_limit() -> None:
    """The largest that a config may have, for sentences of nine tokens."""
    model = Recurrent(30, eos_bias=-100.0)
    assert [len(t) for t in search(model, model.sample([9]), beam=2, max_length_ratio=1e12)] == [63]


def test_min_length_goes_beyond_a_sentence_s_limit_and_not_beyond_the_model_s() -> None:
    model = Recurrent(30, eos_bias=100.0)
    assert [len(t) for t in search(model, model.sample([3, 9]), max_length_ratio=0.5, min_length=9)] == [9, 9]
    assert [len(t) for t in search(model, model.sample([3]), min_length=63)] == [63], "64 positions"
    with pytest.raises(
        ConfigError, match=r"search\.min_length=64 does not fit into the model's 64 positions.*to 63 or less"
    ):
        search(model, model.sample([3]), min_length=64)
    with pytest.raises(ConfigError, match=r"search\.max_length_offset=2 leave less than 3 tokens"):
        SearchConfig(max_length_ratio=0.0, max_length_offset=2, min_length=3)
