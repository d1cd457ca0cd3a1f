"""Statistics of Soft MoE's mixes on mixes whose answer is known."""

from __future__ import annotations

import pytest
import torch

from moe_train.analysis.probe.mixes import expert_importance, mix_statistics, needed_for_share, token_contributions


def test_what_a_slot_is_made_of() -> None:
    dispatch = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.41], [0.0, 0.25, 0.05], [0.0, 0.25, 0.04]])
    assert needed_for_share(dispatch, 0, 0.9).tolist() == [1, 4, 2]
    assert needed_for_share(dispatch, 0, 0.5).tolist() == [1, 2, 1]
    assert needed_for_share(dispatch, 0, 1.0).tolist() == [1, 4, 4]
    with pytest.raises(ValueError, match="share"):
        needed_for_share(dispatch, 0, 0.0)


def test_what_tokens_and_experts_count() -> None:
    dispatch = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    assert token_contributions(dispatch).tolist() == [3.0, 1.0, 0.0, 0.0]
    uniform = torch.full((2, 5, 4), 0.25)
    assert expert_importance(uniform, 2).tolist() == [0.5, 0.5]
    assert expert_importance(torch.eye(4)[[0, 0, 1, 3]], 2).tolist() == [0.75, 0.25]
    with pytest.raises(ValueError, match="divide"):
        expert_importance(uniform, 3)


def test_of_uniform_and_of_hard_mixes() -> None:
    uniform = mix_statistics(torch.full((2, 10, 4), 0.1), torch.full((2, 10, 4), 0.25), 4)
    assert uniform == {"tokens_per_slot": 9.0, "slots_per_token": 4.0, "weak_tokens": 0.0, "expert_importance_max": 1.0}
    hard = torch.eye(4).unsqueeze(0)
    found = mix_statistics(hard, hard, 4)
    assert found["tokens_per_slot"] == found["slots_per_token"] == 1.0 and found["weak_tokens"] == 0.0
    collapsed = torch.zeros(1, 4, 4).index_fill(1, torch.tensor([0]), 1.0)
    assert mix_statistics(collapsed, hard, 4)["weak_tokens"] == 0.75


def test_padding_counts_for_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    dispatch = torch.softmax(torch.randn(2, 6, 4, generator=generator), dim=1)
    combine = torch.softmax(torch.randn(2, 6, 4, generator=generator), dim=2)
    longer = [torch.nn.functional.pad(mix, (0, 0, 0, 3)) for mix in (dispatch, combine)]
    padding = torch.arange(9).expand(2, 9) >= 6
    assert mix_statistics(*longer, 2, padding) == pytest.approx(mix_statistics(dispatch, combine, 2))
    assert mix_statistics(*longer, 2)["weak_tokens"] > mix_statistics(dispatch, combine, 2)["weak_tokens"]
