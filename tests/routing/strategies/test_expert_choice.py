"""Expert choice: equal loads, the best tokens, within a sentence; refused in a decoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import decoder_config, routing_config, strategy
from moe_train.routing.strategies.expert_choice import choose_tokens
from tests.routing.helpers import batch_context, make_router, pairs_by_token, tokens


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.integers(1, 5),
    st.floats(0.1, 4),
    st.integers(0, 1000),
)
def test_each_expert_takes_the_best_of_each_sentence(
    lengths: list[int], num_experts: int, factor: float, seed: int
) -> None:
    total = sum(lengths)
    scores = torch.rand(total, num_experts, generator=torch.Generator().manual_seed(seed))
    group = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    taken = choose_tokens(scores, group, len(lengths), factor)
    for sentence, length in enumerate(lengths):
        rows = (group == sentence).nonzero().squeeze(1)
        capacity = min(length, max(1, math.floor(factor * length / num_experts + 0.5)))
        for expert in range(num_experts):
            best = rows[scores[rows, expert].argsort(descending=True)[:capacity]]
            assert sorted(best.tolist()) == rows[taken[rows, expert]].tolist()


def test_loads_are_equal_and_weights_are_the_scores() -> None:
    router, x = make_router("expert_choice", num_experts=4), tokens(16)
    routing = router(x, batch_context([8, 8], training=True))
    assert routing.statistics.load.tolist() == [8] * 4  # 2 sentences · (2 · 8 / 4)
    assert not routing.losses
    scores = torch.softmax(x @ router.gate.weight.T, -1)
    a = routing.assignment
    torch.testing.assert_close(a.weight, scores[a.token, a.expert])
    counts = [len(pairs) for pairs in pairs_by_token(routing, 16)]
    assert min(counts) < 2 < max(counts), "some tokens are wanted by more experts than others"
    best = [max(p, key=lambda e: p[e]) for p in pairs_by_token(routing, 16) if p]
    assert routing.choices[:, 0][routing.kept[:, 0]].tolist() == best


def test_capacity_beyond_the_sentence_takes_everything() -> None:
    routing = make_router("expert_choice", num_experts=2, capacity_factor=2.0)(tokens(6), batch_context([1, 5]))
    assert routing.kept.all()


def test_the_batch_scope_lets_batch_mates_compete() -> None:
    x, context = tokens(24), batch_context([8, 8, 8])
    sentence = make_router("expert_choice", num_experts=4)(x, context)
    batch = make_router("expert_choice", num_experts=4, scope="batch")(x, context)
    assert sentence.statistics.load.tolist() == batch.statistics.load.tolist() == [12] * 4
    assert pairs_by_token(sentence, 24) != pairs_by_token(batch, 24)


def test_a_later_token_changes_an_earlier_output() -> None:
    """Why a decoder refuses it."""
    router = make_router("expert_choice", num_experts=4, capacity_factor=1.0)
    x, context = tokens(8), batch_context([8])
    before = pairs_by_token(router(x, context), 8)
    taker = next(e for pairs in before[:7] for e in pairs)
    changed = torch.cat((x[:7], 30 * router.gate.weight[taker : taker + 1].detach()))  # now that expert wants the last
    after = pairs_by_token(router(changed, context), 8)
    assert taker in after[7]
    assert after[:7] != before[:7]


def test_decoders_refuse_it_with_the_reason_and_a_way_out() -> None:
    config = routing_config({"name": "expert_choice"})
    with pytest.raises(ConfigError, match=r"later tokens.*routing\.decoder=top_k"):
        decoder_config(config)
    named = routing_config({"name": "expert_choice", "num_experts": 4, "decoder": "top_k"})
    assert decoder_config(named).name == "top_k"
    assert decoder_config(named).num_experts == 4
    with pytest.raises(ConfigError, match="later tokens"):
        decoder_config(routing_config({"name": "top_k", "decoder": "expert_choice"}))


def test_accounting_and_wrong_use() -> None:
    router = strategy("expert_choice").router
    assert router.experts_per_token(routing_config({"name": "expert_choice", "capacity_factor": 1.5})) == 1.5
    with pytest.raises(ConfigError, match="capacity_factor"):
        routing_config({"name": "expert_choice", "capacity_factor": -1.0})
    with pytest.raises(ConfigError, match="'sentence'"):
        routing_config({"name": "expert_choice", "scope": "sentense"})


@pytest.mark.parametrize(("rounding", "expected"), [("half_up", [1, 2, 3]), ("half_even", [1, 2, 2])])
@pytest.mark.parametrize("scope", ["sentence", "batch"])
def test_halves_are_rounded_up_or_as_v_moe_s_code_does(rounding: str, expected: list[int], scope: str) -> None:
    """vmoe's capacity is Python's round(tokens * factor / experts), here at least 1: of 0.5, 1.5, 2.5 it is 1, 2, 2."""
    keys = {"num_experts": 2, "capacity_factor": 1.0, "scope": scope}
    router = make_router("expert_choice", **keys, capacity_rounding=rounding)
    loads = [router(tokens(n), batch_context([n])).statistics.load.tolist() for n in (1, 3, 5)]
    assert loads == [[capacity] * 2 for capacity in expected]
    assert rounding == "half_up" or expected == [max(1, round(n * 1.0 / 2)) for n in (1, 3, 5)]
