"""Balance loss, z-loss and V-MoE's losses: their values where they are known, and their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.routing import LocalReduction
from moe_train.routing.balance_losses import (
    BalanceLoss,
    MeanOverTokens,
    WorldSums,
    rank_load,
    selection_probability,
    squared_variation,
    z_amount,
)
from moe_train.routing.types import RouterLoss, count_per_expert


def alone(loss: RouterLoss) -> torch.Tensor:
    """The loss of one process."""
    return loss.share(WorldSums([loss], LocalReduction()))


def own_load(choices: torch.Tensor, experts: int) -> torch.Tensor:
    return rank_load(count_per_expert(choices, experts), torch.tensor(len(choices)))


def balance_loss(probabilities: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    return alone(BalanceLoss(probabilities.sum(0), own_load(choices, probabilities.shape[1]), 1.0))


def test_uniform_loads_and_probabilities_give_one() -> None:
    choices = torch.arange(4).repeat(5)
    loss = balance_loss(torch.full((20, 4), 0.25), choices)
    assert loss.item() == pytest.approx(1.0)


def test_everything_on_one_expert_gives_the_number_of_experts() -> None:
    probabilities = torch.zeros(6, 3)
    probabilities[:, 1] = 1
    assert balance_loss(probabilities, torch.ones(6, dtype=torch.int64)).item() == pytest.approx(3)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 8), st.floats(0.1, 5))
def test_skew_towards_the_chosen_costs_more_than_one(seed: int, tokens: int, experts: int, scale: float) -> None:
    """f follows the argmax, P the probabilities; with one row of logits for all tokens both are skewed alike."""
    logits = torch.randn(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    probabilities = torch.softmax(logits, -1).repeat(tokens, 1)
    loss = balance_loss(probabilities, probabilities.argmax(-1))
    assert loss.item() >= 1 - 1e-12
    assert loss.item() == pytest.approx(experts * probabilities[0].max().item())


def test_a_token_without_choice_still_counts_as_a_token() -> None:
    load = own_load(torch.tensor([0, -1, 1, -1]), 2)
    assert load.tolist() == [1, 1, 4]
    assert BalanceLoss(torch.zeros(2), load, 1.0).fraction(load).tolist() == [0.25, 0.25]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda amounts: sum(amounts) > 1e-3))
@settings(max_examples=25)
def test_squared_variation_and_its_gradient_are_those_of_the_definition(amounts: list[float]) -> None:
    own = torch.tensor(amounts, dtype=torch.float64, requires_grad=True)
    expected = (own.std(correction=0) / own.mean()) ** 2 if len(set(amounts)) > 1 else own.sum() * 0
    found = alone(squared_variation(own, 5, 1.0))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, own)[0] for value in (found, expected)), atol=1e-8, rtol=1e-6
    )


def test_squared_variation_without_tokens_is_zero() -> None:
    nothing = torch.zeros(4, requires_grad=True)
    loss = alone(squared_variation(nothing, 0, 1.0))
    assert loss.item() == 0
    assert torch.isfinite(torch.autograd.grad(loss, nothing)[0]).all()


def test_the_chance_of_a_choice_is_how_often_it_is_made_with_other_noise() -> None:
    """One expert's noise is drawn 20,000 times, the others' stays."""
    generator = torch.Generator().manual_seed(0)
    logits, std = torch.randn(1, 5, generator=generator, dtype=torch.float64), 0.7
    noisy = logits + std * torch.randn(1, 5, generator=generator, dtype=torch.float64)
    chance = selection_probability(logits, noisy, 2, std)
    threshold = noisy.topk(2).values[0, -1]
    for expert in range(5):
        drawn = logits[0, expert] + std * torch.randn(20_000, generator=generator, dtype=torch.float64)
        assert (drawn >= threshold).double().mean().item() == pytest.approx(chance[0, expert].item(), abs=0.012)


def test_z_loss_of_zero_logits_is_log_e_squared() -> None:
    loss = MeanOverTokens(z_amount(torch.zeros(7, 8)), own_load(torch.zeros(7, dtype=torch.int64), 8), 1.0)
    assert alone(loss).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)
