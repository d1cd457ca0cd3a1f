"""Balance loss and z-loss: their values where they are known, and their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.routing import Alone
from moe_train.routing.losses import balance_loss, world_load, z_loss


def test_uniform_loads_and_probabilities_give_one() -> None:
    choices = torch.arange(4).repeat(5)
    loss = balance_loss(torch.full((20, 4), 0.25), world_load(choices, 4, Alone()))
    assert loss.item() == pytest.approx(1.0)


def test_everything_on_one_expert_gives_the_number_of_experts() -> None:
    probabilities = torch.zeros(6, 3)
    probabilities[:, 1] = 1
    assert balance_loss(
        probabilities, world_load(torch.ones(6, dtype=torch.int64), 3, Alone())
    ).item() == pytest.approx(3)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 8), st.floats(0.1, 5))
def test_skew_towards_the_chosen_costs_more_than_one(seed: int, tokens: int, experts: int, scale: float) -> None:
    """f follows the argmax, P the probabilities; with one row of logits for all tokens both are skewed alike."""
    logits = torch.randn(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    probabilities = torch.softmax(logits, -1).repeat(tokens, 1)
    loss = balance_loss(probabilities, world_load(probabilities.argmax(-1), experts, Alone()))
    assert loss.item() >= 1 - 1e-12
    assert loss.item() == pytest.approx(experts * probabilities[0].max().item())


def test_a_token_without_choice_still_counts_as_a_token() -> None:
    load = world_load(torch.tensor([0, -1, 1, -1]), 2, Alone())
    assert load.fraction.tolist() == [0.25, 0.25]
    assert load.tokens.item() == 4


def test_z_loss_of_zero_logits_is_log_e_squared() -> None:
    assert z_loss(torch.zeros(7, 8), torch.tensor(7.0)).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)
