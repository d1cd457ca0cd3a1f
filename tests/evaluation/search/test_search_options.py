"""Every option of the search against fairseq's SequenceGenerator: n-best lists, token scores, penalties, sampling …"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.config import SearchConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.search import beam_search
from moe_train.evaluation.search.beam_search import BeamSearch
from moe_train.evaluation.search.constraints import block_repeats
from moe_train.evaluation.search.sampler import Sampler
from tests.evaluation.recurrent import Recurrent
from tests.evaluation.test_search_model import batch as real_batch
from tests.evaluation.test_search_model import model as real_model

NAMES = {
    "beam": "beam_size",
    "max_length_ratio": "max_len_a",
    "max_length_offset": "max_len_b",
    "min_length": "min_len",
    "length_penalty": "len_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "top_k": "sampling_topk",
    "top_p": "sampling_topp",
}
LIMITS = {"max_length_ratio": 1.5, "max_length_offset": 5}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beam": 1},
    {"beam": 2, "n_best": 2},
    {"n_best": 5, "length_penalty": 0.0},
    {"n_best": 3, "length_penalty": 0.6},
    {"length_penalty": 1.7, "beam": 8, "n_best": 8},
    {"length_penalty": -1.0, "n_best": 4},
    {"min_length": 6, "n_best": 5},
    {"unk_penalty": -3.0, "n_best": 5},
    {"unk_penalty": 2.5},
    {"temperature": 0.5, "n_best": 5},
    {"temperature": 2.0, "n_best": 5},
    {"no_repeat_ngram": 2, "n_best": 5},
    {"no_repeat_ngram": 3, "beam": 1},
    {"no_repeat_ngram": 3, "n_best": 4, "min_length": 8},
    {"no_repeat_ngram": 4, "length_penalty": 0.3},
    {"no_repeat_ngram": 2, "temperature": 1.5, "unk_penalty": -2.0, "n_best": 5},
    {"max_length_ratio": 0.0, "max_length_offset": 4, "no_repeat_ngram": 2, "n_best": 5},
    {"prefix": 1, "n_best": 5},
    {"prefix": 3, "beam": 1},
    {"prefix": 4, "n_best": 5, "length_penalty": 0.5},
    {"prefix": 2, "no_repeat_ngram": 3, "unk_penalty": -3.0, "n_best": 3},
    {"prefix": 1, "temperature": 1.7, "min_length": 7},
    {"sampling": True, "beam": 1},
    {"sampling": True, "beam": 1, "top_k": 3},
    {"sampling": True, "beam": 1, "top_p": 0.7, "temperature": 1.3},
    {"sampling": True, "beam": 1, "temperature": 0.6, "min_length": 5, "unk_penalty": -2.0},
    {"sampling": True, "beam": 1, "top_p": 0.9, "no_repeat_ngram": 2},
    {"sampling": True, "beam": 1, "top_k": 8, "prefix": 2},
    {"sampling": True, "beam": 1, "top_p": 0.5, "length_penalty": 0.0},
]


def prefixes(symbols: int, rows: int, length: int, seed: int) -> Tensor:
    """[rows, length]: tokens with which translations begin; those of odd rows are shorter where there are several."""
    drawn = torch.randint(3, symbols, (rows, length), generator=torch.Generator().manual_seed(seed))
    drawn[1::2, max(1, length - 1) :] = 1
    return drawn


def by_fairseq(
    monkeypatch: pytest.MonkeyPatch, model: Any, words: Any, net_input: dict[str, Tensor], keys: dict[str, Any]
) -> list[list[dict[str, Tensor]]]:
    """fairseq's hypotheses with two changes: n-grams are compared with those of the hypothesis, not with the end of the
    buffer; and draws (of one sample for each sentence) are ours."""
    from fairseq import sequence_generator as theirs
    from fairseq.search import Sampling

    given = {NAMES.get(key, key): value for key, value in keys.items() if key not in ("n_best", "prefix", "sampling")}
    rules = {name: given.pop(name) for name in ("sampling_topk", "sampling_topp") if name in given}
    if keys.get("sampling"):
        draws = Sampler(SearchConfig(**own_keys(keys)), net_input.get("sentence_uid"), len(net_input["src_tokens"]))
        drawing = Sampling(words, **rules)
        taken: dict[str, Any] = {}
        step = drawing.step

        def note_step(number: int, *arguments: Any) -> Any:
            taken.update(step=number, sentence=arguments[3])
            return step(number, *arguments)

        def multinomial(chances: Tensor, count: int, replacement: bool) -> Tensor:
            uniform = draws.uniform(taken["sentence"], torch.zeros(len(chances), 1, dtype=torch.int64), taken["step"])
            sums = chances.double().cumsum(1)
            return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)

        monkeypatch.setattr(drawing, "step", note_step)
        monkeypatch.setattr(torch, "multinomial", multinomial)
        given["search_strategy"] = drawing
    generator = theirs.SequenceGenerator([model], words, **given)
    if blocker := generator.repeat_ngram_blocker:
        block = blocker._no_repeat_ngram
        monkeypatch.setattr(blocker, "_no_repeat_ngram", lambda tokens, *rest: block(tokens[:, : rest[-1] + 1], *rest))
    sample = {"net_input": net_input, "id": torch.arange(len(net_input["src_tokens"]))}
    forced = prefixes(len(words), len(sample["id"]), keys["prefix"], 5) if keys.get("prefix") else None
    return generator.generate([model], sample, prefix_tokens=forced)


def own_keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {"beam": 5, **LIMITS, **{key: value for key, value in keys.items() if key != "prefix"}}


def compare(
    monkeypatch: pytest.MonkeyPatch, model: Any, words: Any, net_input: dict[str, Tensor], keys: dict[str, Any]
) -> None:
    with monkeypatch.context() as patched:
        expected = by_fairseq(patched, model, words, net_input, {"beam": 5, **LIMITS, **keys})
    config = SearchConfig(**own_keys(keys))
    forced = prefixes(len(words), len(expected), keys["prefix"], 5) if keys.get("prefix") else None
    search = BeamSearch(model, words, config)
    found, fast = (search(net_input, forced, scores).lists(config.n_best) for scores in (True, False))
    for ours, plain, all_of_theirs in zip(found, fast, expected, strict=True):
        theirs = all_of_theirs[: config.n_best]
        assert [one.tokens for one in ours] == [one["tokens"].tolist()[:-1] for one in theirs]
        assert [one.score for one in ours] == pytest.approx([float(one["score"]) for one in theirs], rel=1e-5, abs=2e-5)
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_scores == pytest.approx(other["positional_scores"].tolist(), rel=1e-5, abs=5e-5)
        assert [one.tokens for one in plain] == [one.tokens for one in ours]
        assert [one.score for one in plain] == pytest.approx([one.score for one in ours], rel=1e-5, abs=2e-5)


@pytest.fixture(scope="module")
def trained() -> Recurrent:
    """Trained for a short time to translate each word into the next one of the dictionary."""
    model = Recurrent(20, seed=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for update in range(150):
        source = model.sample([5] * 16, update)["src_tokens"]
        target = (source + 1).where((source > 3) & (source < 19), source)
        inputs = torch.cat((torch.full((16, 1), model.words.eos()), target[:, :-1]), dim=1)
        loss = torch.nn.functional.cross_entropy(model.decoder(inputs, model.encoder(source))[0].mT, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2
    return model.eval()


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda keys: ",".join(f"{k}={v}" for k, v in keys.items()) or "default")
def test_fairseq_s_generator_gives_the_same(
    keys: dict[str, Any], trained: Recurrent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, symbols in enumerate((12, 600)):
        model = Recurrent(symbols, eos_bias=1.0 - 2 * seed, seed=seed).eval()
        with torch.no_grad():
            model.decoder.out.bias[model.words.unk()] += 2.0
        compare(monkeypatch, model, model.words, model.sample([8] * 6, seed), keys)
    compare(monkeypatch, trained, trained.words, trained.sample([8] * 4), keys)
    transformer = real_model("switch", seed=3)
    compare(monkeypatch, transformer, transformer.decoder.dictionary, real_batch([9] * 4), keys)


def test_no_ngram_occurs_twice() -> None:
    model = Recurrent(9, eos_bias=-9.0)
    for size in (1, 2, 3):
        found = BeamSearch(model, model.words, SearchConfig(no_repeat_ngram=size, n_best=5, max_length_offset=3))
        for own in found(model.sample([9, 4, 7])).lists(5):
            for one in own:
                ngrams = [tuple(one.tokens[i : i + size]) for i in range(len(one.tokens) - size + 1)]
                assert len(set(ngrams)) == len(ngrams)
    log_probs = torch.zeros(1, 9)
    block_repeats(log_probs, torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6]]), 3)
    assert (log_probs == -torch.inf).nonzero()[:, 1].tolist() == [7, 8]


def test_a_prefix_longer_than_the_limit_is_kept_and_cut_at_the_model_s_positions() -> None:
    model = Recurrent(30, eos_bias=100.0)
    search = BeamSearch(model, model.words, SearchConfig(max_length_ratio=0.0, max_length_offset=2))
    forced = torch.tensor([[7, 8, 9, 10, 11], [7, 1, 1, 1, 1]])
    assert search(model.sample([5, 5]), forced).best() == [[7, 8, 9, 10, 11], [7]]
    assert [len(one) for one in search(model.sample([5]), torch.full((1, 90), 7)).best()] == [63]


@pytest.mark.parametrize("rules", [{}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_samples_have_the_model_s_distribution(rules: dict[str, Any]) -> None:
    symbols, count = 10, 40_000
    log_probs = torch.randn(symbols, generator=torch.Generator().manual_seed(1)).mul(2).log_softmax(0)
    log_probs[1] = -torch.inf
    sampler = Sampler(SearchConfig(sampling=True, **rules), torch.arange(count) * 7919, count)
    drawn = sampler.draw(log_probs.repeat(count, 1), torch.zeros(count, 1), torch.arange(count), 3)
    order = log_probs.exp().argsort(descending=True)
    mass = log_probs.exp()[order].cumsum(0)
    allowed = symbols if not rules else rules.get("top_k", int((mass < rules.get("top_p", 1)).sum()) + 1)
    wanted = torch.zeros(symbols)
    wanted[order[:allowed]] = log_probs.exp()[order[:allowed]]
    wanted /= wanted.sum()
    found = torch.bincount(drawn.token.flatten(), minlength=symbols) / count
    assert (found - wanted).abs().max() < 4 * (0.25 / count) ** 0.5
    assert not found[wanted == 0].any()
    torch.testing.assert_close(drawn.score, log_probs[drawn.token])


def test_a_flat_distribution_has_a_wide_nucleus() -> None:
    """More symbols than are ranked at first; in the same batch as rows that need few."""
    symbols, rows = 700, 200
    log_probs = torch.randn(rows, symbols, generator=torch.Generator().manual_seed(2))
    log_probs[::2] *= 8
    log_probs = log_probs.log_softmax(1)
    sampler = Sampler(SearchConfig(sampling=True, top_p=0.9), None, rows)
    drawn = sampler.draw(log_probs, torch.zeros(rows, 1), torch.arange(rows), 0)
    before = (log_probs.exp() * (log_probs > drawn.score)).sum(1)
    assert before.max() < 0.9 and before[1::2].max() > 0.7
    assert drawn.token[1::2].unique().numel() > 80
    alone = [sampler.draw(log_probs[n : n + 1], torch.zeros(1, 1), torch.tensor([n]), 0).token for n in range(rows)]
    assert torch.equal(torch.cat(alone), drawn.token)


def test_samples_are_the_same_in_any_batch_and_differ_among_each_other() -> None:
    model = Recurrent(50).double()
    lengths = [9, 4, 7, 12]
    given = model.sample(lengths)
    given["sentence_uid"] = torch.tensor([11, 12, 13, 14])
    search = BeamSearch(model, model.words, SearchConfig(beam=4, n_best=4, sampling=True, temperature=1.5))
    together = search(given, token_scores=True).lists(4)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        alone["src_tokens"] = alone["src_tokens"][:, :length]
        (own,) = search(alone, token_scores=True).lists(4)
        assert [one.tokens for one in own] == [one.tokens for one in together[row]]
        assert len({tuple(one.tokens) for one in own}) == 4
        for one in own:
            inputs = torch.tensor([[2, *one.tokens]])
            log_probs = (
                model.decoder(inputs, encoder_out=model.encoder(alone["src_tokens"]))[0].div(1.5).log_softmax(-1)
            )
            wanted = log_probs[0, torch.arange(len(one.tokens) + 1), torch.tensor([*one.tokens, 2])]
            assert one.token_scores == pytest.approx(wanted.tolist(), abs=1e-5)
    assert BeamSearch(model, model.words, SearchConfig(beam=4, sampling=True, seed=2))(given).best() != [
        own[0].tokens for own in together
    ]


def test_the_kernels_are_used_wherever_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """An n-best list and a temperature are no reason to leave them."""
    asked = []
    monkeypatch.setattr(beam_search, "is_supported", lambda logits: bool(asked.append(logits)))
    model = Recurrent(30)
    options: list[dict[str, Any]] = [
        {},
        {"n_best": 5},
        {"temperature": 2.0},
        {"no_repeat_ngram": 3},
        {"sampling": True},
    ]
    for number, keys in enumerate(options):
        BeamSearch(model, model.words, SearchConfig(**keys))(model.sample([4]))
        assert len(asked) == min(number + 1, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_best": 6}, r"search\.n_best=6 is more than search\.beam=5\. Set search\.beam=6"),
        ({"top_k": 3}, r"search\.sampling is false\. Set search\.sampling=true"),
        ({"top_p": 0.5}, r"search\.sampling is false"),
        ({"sampling": True, "top_k": 3, "top_p": 0.5}, "are both set. Choose one of them"),
        ({"temperature": 0.0}, r"search\.temperature"),
        ({"sampling": True, "top_p": 0.0}, r"search\.top_p"),
    ],
)
def test_options_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**keys)
