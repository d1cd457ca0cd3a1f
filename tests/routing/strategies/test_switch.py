"""Switch: the definition, its initialisation and its jitter."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import RouterInputs, build_router, routing_config, strategy
from moe_train.routing.noise import jitter
from tests.routing.helpers import batch_context, make_router, shares, tokens


def test_the_token_goes_to_the_most_probable_expert_with_its_probability() -> None:
    router, x = make_router("switch", num_experts=4), tokens(9)
    routing = router(x, batch_context([9], training=True))
    probabilities = torch.softmax(x @ router.gate.weight.T, -1)
    best, expert = probabilities.max(-1)
    assert torch.equal(routing.assignment.expert, expert)
    torch.testing.assert_close(routing.assignment.weight, best)
    assert torch.equal(routing.assignment.token, torch.arange(9))
    fraction = torch.bincount(expert, minlength=4) / 9
    expected = 4 * (fraction * probabilities.mean(0)).sum()
    torch.testing.assert_close(shares(routing)["balance_loss"].value, expected)
    assert shares(routing)["balance_loss"].weight == 0.01


def test_only_the_first_of_the_batch_are_served_and_the_others_have_no_pair() -> None:
    router = make_router("switch", num_experts=2, capacity_factor=1.0)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.weight[1] = 1
    routing = router(torch.ones(6, 12, dtype=torch.float64), batch_context([6], training=True))
    assert routing.assignment.token.tolist() == [0, 1, 2]
    assert int(routing.statistics.dropped) == 3
    assert routing.choices.squeeze(1).tolist() == [1] * 6
    assert shares(routing)["balance_loss"].value.item() > 1, "what is dropped still counts in f"


def test_evaluation_drops_nothing_by_default() -> None:
    x, context = tokens(12), batch_context([12])
    assert make_router("switch", capacity_factor=0.25)(x, context).kept.all()
    limited = make_router("switch", num_experts=4, capacity_factor=1.0, evaluation_capacity_factor=0.25)(x, context)
    assert limited.statistics.load.max() == 1


def test_the_gate_starts_truncated_at_two_standard_deviations() -> None:
    torch.manual_seed(0)
    weight = build_router(routing_config({"name": "switch", "num_experts": 64}), RouterInputs(400)).gate.weight
    std = math.sqrt(0.1 / 400)
    assert weight.abs().max() <= 2 * std
    assert weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # std of a normal cut at two


def test_jitter_stays_in_its_interval_and_out_of_evaluation() -> None:
    x = torch.ones(200, 5, dtype=torch.float64)
    context = batch_context([200], training=True)
    noisy = jitter(x, 0.1, context)
    assert 0.9 <= noisy.min() < 0.91 and 1.09 < noisy.max() <= 1.1
    assert noisy.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(jitter(x, 0.1, batch_context([200])), x)
    assert not torch.equal(noisy, jitter(x, 0.1, batch_context([200], training=True, update=1)))


def test_accounting() -> None:
    config = routing_config({"name": "switch", "num_experts": 16})
    router = strategy("switch").router
    assert router.experts_per_token(config) == 1
    assert router.router_flops_per_token(config, 512) == 2 * 512 * 16


def test_output_masking_drops_in_training_and_scales_at_evaluation() -> None:
    plain, masked = make_router("switch"), make_router("switch", expert_output_masking=0.3)
    x = tokens(2000)
    reference = plain(x, batch_context([2000])).assignment.weight
    torch.testing.assert_close(masked(x, batch_context([2000])).assignment.weight, reference * 0.7)
    weight = masked(x, batch_context([2000], training=True)).assignment.weight
    assert (weight == 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    survivors = weight != 0
    assert torch.equal(weight[survivors], reference[survivors]), "no rescaling in training"
