"""Expected rows against enumeration, and against real routers' choices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.analysis.planner.cost_rows import (
    expected_flows,
    expected_pairs,
    expected_rows,
    inclusion,
    sampling_weights,
    symmetric_sums,
)
from moe_train.layers import MoELayer
from moe_train.parallel.layout_plan import plan_layout
from moe_train.routing import registered_strategies, routing_config
from moe_train.routing.expected_load import ExpectedChoices


def flat(experts: int, k: int) -> tuple[ExpectedChoices, ...]:
    return (ExpectedChoices(1.0, 0, experts, k),)


def destinations(experts: Iterable[int], each: int) -> set[int]:
    return {e // each for e in experts}


@given(st.sampled_from([(8, 4), (8, 2), (12, 3), (6, 6)]), st.integers(1, 4))
def test_equal_loads_are_an_average_over_all_sets(sizes: tuple[int, int], k: int) -> None:
    experts, parts = sizes
    every = [destinations(chosen, experts // parts) for chosen in combinations(range(experts), k)]
    want = [sum(part in found for found in every) / len(every) for part in range(parts)]
    assert expected_rows(flat(experts, k), experts, parts) == pytest.approx(want, abs=1e-12)
    assert expected_rows(flat(experts, k), experts, parts).sum() <= min(k, parts) + 1e-12
    assert expected_pairs(flat(experts, k), experts, parts).sum() == pytest.approx(k)


@given(st.lists(st.floats(0.05, 1.0), min_size=8, max_size=8), st.integers(1, 3))
def test_given_loads_are_those_of_the_law_of_largest_entropy(raw: list[float], k: int) -> None:
    loads = np.array(raw) * k / sum(raw)
    if loads.max() > 0.95:  # a token cannot choose an expert twice
        return
    weights = sampling_weights(loads)
    law = {chosen: prod(weights[list(chosen)]) for chosen in combinations(range(8), k)}
    whole = sum(law.values())
    by_expert = [sum(p for chosen, p in law.items() if e in chosen) / whole for e in range(8)]
    assert by_expert == pytest.approx(loads, abs=1e-6)
    assert inclusion(weights, k) == pytest.approx(loads, abs=1e-6)
    want = [sum(p for chosen, p in law.items() if part in destinations(chosen, 2)) / whole for part in range(4)]
    assert expected_rows(flat(8, k), 8, 4, raw) == pytest.approx(want, abs=1e-6)


def test_equal_given_loads_change_nothing() -> None:
    for choices in (flat(8, 3), tuple(ExpectedChoices(0.25, 2 * g, 2, 2) for g in range(4))):
        assert expected_rows(choices, 8, 4, [7.0] * 8) == pytest.approx(expected_rows(choices, 8, 4))


def test_given_loads_move_shares_between_groups() -> None:
    groups = tuple(ExpectedChoices(0.5, 4 * g, 4, 2) for g in range(2))
    assert expected_rows(groups, 8, 2, [3.0] * 4 + [1.0] * 4) == pytest.approx([0.75, 0.25])


def test_symmetric_sums() -> None:
    assert symmetric_sums(np.array([2.0, 3.0, 5.0]), 3) == pytest.approx([1, 10, 31, 30])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sam_sends_one_row_where_groups_stand_on_ranks(k: int) -> None:
    config = routing_config({"name": "sam", "num_experts": 16, "num_groups": 4, "top_k": k})
    choices = registered_strategies()["sam"].router.expected_choices(config)
    assert expected_rows(choices, 16, 4).sum() == pytest.approx(1.0)
    assert expected_rows(choices, 16, 2).sum() == pytest.approx(1.0)
    split = expected_rows(choices, 16, 8).sum()  # two ranks to a group of four
    assert split == pytest.approx({1: 1.0, 2: 2 * (1 - 1 / 6), 4: 2.0}[k])


def test_two_levels_cross_once_per_node() -> None:
    choices = flat(16, 4)
    (one,) = expected_flows(plan_layout(4, 2, 4, 16), choices, 16)
    across, inside = expected_flows(plan_layout(4, 2, 4, 16, two_level=True), choices, 16)
    assert one.rows["across"] == pytest.approx(2 * (1 - 495 / 1820))
    assert across.rows["across"] == pytest.approx(1 - 70 / 1820)
    assert across.rows["node"] == 0 and inside.rows["across"] == 0
    assert sum(inside.rows.values()) == pytest.approx(sum(one.rows.values()))
    assert sum(across.pairs.values()) == sum(inside.pairs.values()) == pytest.approx(4)
    assert expected_flows(plan_layout(4, 2, 1, 16), choices, 16) == ()


KEYS: dict[str, dict[str, Any]] = {
    "switch": {},
    "top_k": {"top_k": 3},
    "sam": {"num_groups": 4, "top_k": 2},
    "thor": {"draw": "token"},
    "random": {},
    "smoe": {"strata": [4, 4]},
}


@pytest.mark.parametrize("name", KEYS)
def test_a_router_without_preferences_sends_as_many(name: str) -> None:
    """Real routers on noise: gates with orthogonal rows make experts nearly equally likely."""
    experts, parts, sentences, length = 8, 4, 200, 100
    keys = {"name": name, "num_experts": experts, **KEYS[name]}
    torch.manual_seed(0)
    layer = MoELayer(64, 2, keys).train()
    for parameter in layer.block.router.parameters():  # type: ignore[union-attr]
        if parameter.dim() == 2:
            torch.nn.init.orthogonal_(parameter)
    _, record = layer(torch.randn(sentences, length, 64))
    rows = np.zeros(parts)
    for routing in record.routing:
        pairs = torch.stack([routing.assignment.token, routing.assignment.expert // (experts // parts)], 1)
        rows += np.bincount(pairs.unique(dim=0)[:, 1].numpy(), minlength=parts)
    config = routing_config(keys)
    want = expected_rows(registered_strategies()[name].router.expected_choices(config), experts, parts)
    assert rows / (sentences * length) == pytest.approx(want, rel=0.05)


def test_a_batch_that_draws_one_expert_fills_one_rank() -> None:
    thor = registered_strategies()["thor"].router

    def max_over_mean(**keys: Any) -> float:
        return thor.max_load_share(routing_config({"name": "thor", "num_experts": 8, **keys}), 4)

    assert max_over_mean(draw="sentence") == max_over_mean(draw="token") == 0.25
    assert max_over_mean() == pytest.approx(1 / 7 + 6 / 7 / 2)  # the partner is one of 7, one of them on the same rank
    assert max_over_mean(pair="independent") == pytest.approx(1 / 4 + 3 / 4 / 2)
    assert max_over_mean(passes=1, consistency_weight=0.0) == 1.0
