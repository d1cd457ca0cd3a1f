"""SMoE's gates: visible experts, the next stratum, capacity, closed form of passes. The block is in tests/layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import routing_config, strategy
from moe_train.routing.strategies.smoe import expected_visits
from tests.routing.helpers import DIM, batch_context, make_router, on_ranks, rank_context, rank_rows, shares, tokens

strata_sizes = st.lists(st.integers(2, 5), min_size=1, max_size=4)


@given(strata_sizes, st.integers(0, 100))
def test_a_gate_sees_its_own_and_later_strata_only(sizes: list[int], seed: int) -> None:
    router = make_router("smoe", seed=seed, num_experts=sum(sizes), strata=sizes)
    for i, gate in enumerate(router.strata):
        assert gate.gate.weight.shape == (sum(sizes[i:]), DIM)
        routing = router(tokens(9, seed=seed), batch_context([9], training=True), i)
        assert routing.choices.min() >= sum(sizes[:i])
        assert not routing.statistics.load[: sum(sizes[:i])].any()
        onward = router.next_stratum(routing.choices)
        assert (onward > i).all() and (onward <= len(sizes)).all()
        bounds = torch.tensor(sizes).cumsum(0)
        assert torch.equal(onward, torch.bucketize(routing.choices[:, 0].contiguous(), bounds, right=True) + 1)
    assert sum(p.numel() for p in router.parameters()) == DIM * sum(sum(sizes[i:]) for i in range(len(sizes)))


def test_weights_are_raw_probabilities_and_losses_those_of_the_visible_experts() -> None:
    router, x = make_router("smoe", strata=[3, 5]), tokens(10)
    routing = router(x, batch_context([10], training=True), 1)
    probabilities = torch.softmax(x @ router.strata[1].gate.weight.T, -1)
    best, local = probabilities.topk(2)
    assert torch.equal(routing.choices, local + 3)
    torch.testing.assert_close(routing.assignment.weight.view(10, 2), best)
    fraction = torch.bincount(local[:, 0], minlength=5) / 10
    expected = 5 * (fraction * probabilities.mean(0)).sum()
    torch.testing.assert_close(shares(routing)["balance_loss"].value, expected)


@given(st.integers(0, 999), st.integers(0, 1))
@settings(max_examples=15)
def test_weights_normalised_before_drops_count_a_second_expert_that_was_left_out(seed: int, stratum: int) -> None:
    keys = {"strata": [3, 5], "second_expert": "random", "normalise": "before_drop"}
    router, x = make_router("smoe", seed=seed, **keys), tokens(40, seed=seed)
    routing = router(x, batch_context([40], training=True), stratum)
    best = torch.softmax(x @ router.strata[stratum].gate.weight.T, -1).topk(2).values
    expected = best / best.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.assignment.weight, expected[routing.kept])


def test_balance_is_one_at_uniform_probabilities() -> None:
    router = make_router("smoe", strata=[2, 6])
    for i in (0, 1):
        with torch.no_grad():
            router.strata[i].gate.weight.zero_()
        loss = shares(router(tokens(8), batch_context([8], training=True), i))["balance_loss"].value
        assert loss.item() == pytest.approx(1)


@given(strata_sizes, st.integers(0, 40), st.sampled_from([0.5, 1.0, 1.5]), st.integers(0, 50))
def test_no_expert_takes_more_than_its_capacity(sizes: list[int], count: int, factor: float, seed: int) -> None:
    router = make_router("smoe", seed=seed, num_experts=sum(sizes), strata=sizes, capacity_factor=factor)
    for i in range(len(sizes)):
        routing = router(tokens(count, seed=seed), batch_context([count], training=True), i)
        limit = math.ceil(factor * 2 * math.ceil(count / sum(sizes[i:])))
        assert routing.statistics.load.max() <= limit
        assert torch.equal(router.next_stratum(routing.choices) > i, torch.ones(count, dtype=torch.bool))


def test_capacity_looks_at_the_rank_with_most_active_tokens() -> None:
    router, x, context = make_router("smoe", capacity_factor=1.0), tokens(20), batch_context([16, 4], training=True)
    for gate in router.strata:
        with torch.no_grad():
            gate.gate.weight.zero_()  # everybody wants the first two

    def one_rank(ranks: object) -> torch.Tensor:
        rows = rank_rows(context, ranks.rank, 2)  # type: ignore[attr-defined]
        own = rank_context(context, ranks.rank, 2, ranks)  # type: ignore[attr-defined,arg-type]
        return router(x[rows], own).statistics.load.max()

    assert [int(n) for n in on_ranks(2, one_rank)] == [4, 4]  # 2 · ⌈16 / 8⌉, and all four of the other rank


def test_every_pass_draws_second_experts_of_its_own() -> None:
    router, x = make_router("smoe", strata=[4, 4], second_expert="sampling", num_experts=8), tokens(400)
    router.strata[0].gate.weight.data.zero_()
    router.strata[1].gate.weight.data.zero_()
    context = batch_context([400], training=True)
    second = [router(x, context, i).choices[:, 1] for i in (0, 1)]
    late = second[0] >= 4
    assert (second[0][late] == second[1][late]).double().mean().item() < 0.5


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        ([4, 4], 1.5),
        ([2, 2, 2, 2], 25 / 12),
        ([4, 12], 1.25),
        ([12, 4], 1.75),
        ([8, 8], 1.5),
        ([4, 4, 8], 19 / 12),
        ([4, 4, 4, 4], 25 / 12),
        ([16], 1.0),
    ],
)
def test_the_closed_form_of_passes(sizes: list[int], passes: float) -> None:
    """§2.7's R_1, which gives tables 1 and 2 of the paper their FLOPs."""
    assert sum(expected_visits(sizes)) == pytest.approx(passes)
    config = routing_config({"name": "smoe", "num_experts": sum(sizes), "strata": sizes})
    assert strategy("smoe").router.experts_per_token(config) == pytest.approx(2 * passes)


def recursion(sizes: list[int], i: int = 0) -> float:
    """R_i = 1 + Σ_{j≥i} n_j / Σ_{m≥i} n_m · R_{j+1}, R_{L+1} = 0: the definition."""
    if i == len(sizes):
        return 0.0
    return 1 + sum(sizes[j] / sum(sizes[i:]) * recursion(sizes, j + 1) for j in range(i, len(sizes)))


@given(strata_sizes)
def test_visits_agree_with_the_recursion(sizes: list[int]) -> None:
    assert sum(expected_visits(sizes)) == pytest.approx(recursion(sizes))
    visits = expected_visits(sizes)
    config = routing_config({"name": "smoe", "num_experts": sum(sizes), "strata": sizes})
    flops = sum(v * 2 * 64 * sum(sizes[i:]) for i, v in enumerate(visits))
    assert strategy("smoe").router.router_flops_per_token(config, 64) == pytest.approx(flops)


def test_strata_default_to_halves() -> None:
    assert routing_config({"name": "smoe"}).sizes == (4, 4)
    assert routing_config({"name": "smoe", "num_experts": 5}).sizes == (2, 3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strata": [4, 12]}, ["routing.strata=[4, 12]", "16", "routing.num_experts=8"]),
        ({"strata": [8, 0]}, ["routing.strata", "above 0"]),
        ({"strata": [-1, 9]}, ["routing.strata", "above 0"]),
        ({"strata": [7, 1]}, ["routing.top_k=2", "last stratum", "1"]),
        ({"strata": 8}, ["routing.strata", "list"]),
        ({"top_k": 3, "second_expert": "random"}, ["two experts"]),
        ({"norm": "offical"}, ["routing.norm", "'official'"]),
        ({"stratum": [4, 4]}, ["routing.stratum", "'strata'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "smoe", **keys})
    for word in words:
        assert word in str(caught.value)
