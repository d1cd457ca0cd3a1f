"""Routing fluctuation and inter-run consistency on inputs whose answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.analysis.probe.stability import fluctuation_ratio, inter_run_consistency


def test_fluctuation_counts_changed_tokens() -> None:
    assert fluctuation_ratio(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, 0])) == 0.5


@given(st.lists(st.integers(0, 7), max_size=30))
def test_the_same_checkpoint_does_not_fluctuate(choices: list[int]) -> None:
    assert fluctuation_ratio(torch.tensor(choices), torch.tensor(choices)) == 0.0


def test_other_tokens_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        fluctuation_ratio(torch.zeros(3), torch.zeros(4))


def test_identical_runs_agree_fully() -> None:
    assert inter_run_consistency([torch.tensor([5, 1, 2])] * 4) == pytest.approx(1.0)


def test_opposite_runs_cancel() -> None:
    assert inter_run_consistency([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])]) == pytest.approx(0.0)


def test_unrelated_runs_give_the_floor() -> None:
    loads = [torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])]
    assert inter_run_consistency(loads) == pytest.approx(1 / 2)


def test_balanced_runs_have_no_correlation_with_others() -> None:
    assert inter_run_consistency([torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])]) == pytest.approx(1 / 2)
