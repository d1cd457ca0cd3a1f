"""Order of priority, and that no expert takes more than its capacity."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.routing.capacity import capacity_mask, expert_capacity, positions_in_expert, within_capacity
from tests.routing.helpers import batch_context, make_router, tokens

choice_rows = st.lists(st.permutations(range(5)), min_size=0, max_size=20)


def naive(choices: list[list[int]], order: list[int], capacity: int) -> list[list[bool]]:
    """First choices in order, then second ones: the definition."""
    used: dict[int, int] = {}
    kept = [[False] * len(row) for row in choices]
    for rank in range(len(choices[0]) if choices else 0):
        for token in order:
            expert = choices[token][rank]
            if expert >= 0 and used.get(expert, 0) < capacity:
                used[expert] = used.get(expert, 0) + 1
                kept[token][rank] = True
    return kept


@given(choice_rows, st.integers(1, 4), st.integers(0, 6), st.randoms(use_true_random=False), st.booleans())
def test_within_capacity_follows_the_definition(
    rows: list[list[int]], k: int, capacity: int, random: object, holes: bool
) -> None:
    chosen = [row[:k] for row in rows]
    if holes:
        chosen = [[e if i == 0 or e % 2 else -1 for i, e in enumerate(row)] for row in chosen]
    order = list(range(len(chosen)))
    random.shuffle(order)  # type: ignore[attr-defined]
    choices = torch.tensor(chosen, dtype=torch.int64).reshape(len(chosen), k)
    kept = within_capacity(choices, torch.tensor(order, dtype=torch.int64), capacity, 5)
    assert kept.tolist() == naive(chosen, order, capacity)


def test_positions_count_earlier_entries_of_the_same_expert() -> None:
    assert positions_in_expert(torch.tensor([2, 0, 2, 2, 0]), 3).tolist() == [0, 0, 1, 2, 1]


def test_capacity_is_factor_times_fair_share_rounded_up() -> None:
    choices = torch.zeros(10, 1, dtype=torch.int64)
    for factor in (0.1, 1.0, 1.25, 2.0):
        kept = capacity_mask(choices, expert_capacity(factor, torch.tensor(10.0), 4), 4, batch_context([10]))
        assert int(kept.sum()) == min(10, max(1, math.ceil(factor * 10 / 4)))
        assert kept[: int(kept.sum())].all(), "the first of the batch are served first"


@given(
    st.sampled_from([("switch", 1), ("top_k", 1), ("top_k", 2), ("top_k", 3)]),
    st.sampled_from(["result", "share"]),
    st.sampled_from([0.4, 1.0, 1.25, 2.0]),
    st.integers(0, 60),
    st.integers(3, 9),
)
@settings(max_examples=40)
def test_what_is_rounded_is_a_key(
    strategy: tuple[str, int], rounding: str, factor: float, count: int, num_experts: int
) -> None:
    """Of a gate that sends everybody to the same experts, each takes its capacity: the papers' share, or fairseq's."""
    name, k = strategy
    keys = {"top_k": k, "normalise": "none"} if name == "top_k" else {}
    router = make_router(name, num_experts=num_experts, capacity_factor=factor, capacity_rounding=rounding, **keys)
    torch.nn.init.zeros_(router.gate.weight)
    routing = router(tokens(count), batch_context([count], training=True))
    if rounding == "result":
        limit = math.ceil(factor * (k * count) / num_experts)
    else:
        limit = int(factor * (k * math.ceil(count / num_experts)))
    expected = min(count, max(1, limit))
    assert sorted(routing.statistics.load.tolist()) == [0] * (num_experts - k) + [expected] * k


def test_batch_prioritised_uses_weights() -> None:
    choices = torch.zeros(8, 1, dtype=torch.int64)
    sure = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.5, 0.4, 0.7])
    kept = capacity_mask(choices, torch.tensor(4), 2, batch_context([8]), priority=sure)
    assert kept.squeeze(1).nonzero().squeeze(1).tolist() == [1, 3, 5, 7]


def test_second_choices_never_displace_first_ones() -> None:
    choices = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    kept = capacity_mask(choices, torch.tensor(2), 2, batch_context([4]))
    assert kept.tolist() == [[True, False]] * 4
