"""Drops, load by language, specialisation and requested capacity on inputs whose answer is known."""

from __future__ import annotations

import pytest
import torch

from moe_train.analysis.probe.drops import count_drops
from moe_train.analysis.probe.groups import (
    load_by_group,
    load_statistics,
    mean_by_label,
    pairs_by_group,
    requested_capacity_by_layer,
    specialisation,
)


def test_tokens_that_are_dropped() -> None:
    choices = torch.tensor([[0, 1], [0, 2], [3, -1], [-1, -1], [2, 3]])
    kept = torch.tensor([[True, True], [False, True], [False, False], [False, False], [False, False]])
    drops = count_drops(choices, kept)
    assert (drops.tokens, drops.dropped, drops.partly, drops.experts_per_token) == (5, 3, 1, (3, 1, 1))
    assert drops.dropped_fraction == 0.6
    assert count_drops(choices[:0], kept[:0]).dropped_fraction == 0.0


def test_load_by_language() -> None:
    experts, language = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 2])
    counts = pairs_by_group(experts, language, num_experts=3, num_groups=4)
    assert counts.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 3], [0, 0, 0]]
    load = load_by_group(counts)
    assert load.tolist() == [pytest.approx([2 / 3, 1 / 3, 0]), [0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_specialisation() -> None:
    assert specialisation(torch.eye(3) * 7) == pytest.approx(1.0)
    assert specialisation(torch.ones(3, 5)) == pytest.approx(0.0, abs=1e-12)
    assert specialisation(torch.tensor([[3.0, 4.0]])) == 0.0
    # Two equal groups; one expert for all of the first and half of the second: I = H(E) - H(E | group).
    half, quarter = 0.5 * torch.tensor(2.0).log(), torch.tensor([0.75, 0.25])
    information = torch.special.entr(quarter).sum() - half
    expected = float(information / torch.tensor(2.0).log())
    assert specialisation(torch.tensor([[2.0, 0.0], [1.0, 1.0]])) == pytest.approx(expected)


def test_load_statistics() -> None:
    found = load_statistics(torch.tensor([4, 0, 2, 2]))
    assert found == {"max_over_mean": 2.0, "variation": pytest.approx(2**-0.5), "dead": 1.0}
    assert load_statistics(torch.full((5,), 3)) == {"max_over_mean": 1.0, "variation": 0.0, "dead": 0.0}


def test_requested_capacity() -> None:
    passes = torch.tensor([1, 2, 4, 1])
    assert mean_by_label(passes, torch.tensor([7, 7, 3, 3])) == {3: 2.5, 7: 1.5}
    assert requested_capacity_by_layer({0: passes, 2: torch.tensor([1, 1]), 5: torch.tensor([9])}, [0, 2]) == 1.5
    with pytest.raises(ValueError, match="at least one block"):
        requested_capacity_by_layer({}, [])
