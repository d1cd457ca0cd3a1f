"""X-MoE: cosine scores, temperature, balance at its own temperature, freezing; and torchscale's departures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import routing_config, strategy
from tests.routing.helpers import DIM, batch_context, make_experts, make_router, mix, objective, pairs_by_token, tokens

scale = st.floats(0.01, 100)


def weights_of(router: Any, x: torch.Tensor) -> torch.Tensor:
    return router(x, batch_context([x.shape[0]])).assignment.weight.detach()


@given(scale, scale, st.integers(0, 100), st.sampled_from(["softmax", "sigmoid"]))
def test_lengths_of_tokens_and_embeddings_do_not_matter(c: float, e: float, seed: int, gate: str) -> None:
    router, x = make_router("xmoe", gate=gate), tokens(9, seed=seed)
    context = batch_context([9])
    before = router(x, context)
    factors = e ** torch.linspace(-1, 1, 8, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        router.embedding.mul_(factors)
    after = router(c * x, context)
    assert torch.equal(before.choices, after.choices)
    torch.testing.assert_close(before.assignment.weight, after.assignment.weight, rtol=1e-9, atol=0)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_scores_are_cosines(seed: int, count: int) -> None:
    assert make_router("xmoe", seed=seed).scores(tokens(count, seed=seed)).abs().max() <= 1 + 1e-12


@given(st.integers(2, 12), st.floats(0.05, 2), st.integers(0, 100))
def test_the_softmax_gate_is_bounded(num_experts: int, tau: float, seed: int) -> None:
    router = make_router("xmoe", seed=seed, num_experts=num_experts, initial_temperature=tau)
    bound = 1 / (1 + (num_experts - 1) * math.exp(-2 / tau))
    assert weights_of(router, tokens(20, seed=seed)).max() <= bound + 1e-7


@pytest.mark.parametrize(("gate", "tau"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_the_gate_follows_its_equation_and_tau_starts_at_tau_0(gate: str, tau: float) -> None:
    router, x = make_router("xmoe", gate=gate), tokens(5)
    assert router.temperature.item() == pytest.approx(tau, rel=1e-6)
    z = x @ router.projection.weight.T
    cosine = z @ router.embedding.T / (z.norm(dim=-1, keepdim=True) * router.embedding.norm(dim=-1))
    logits = cosine / router.temperature
    expected = (torch.sigmoid(logits) if gate == "sigmoid" else torch.softmax(logits, -1)).gather(
        1, cosine.argmax(-1, keepdim=True)
    )
    torch.testing.assert_close(weights_of(router, x), expected.squeeze(1).detach())


def test_the_router_moves_hidden_states_in_few_dimensions_only() -> None:
    """§3.1: the rank of the scores' Jacobian by h is at most d_e."""
    router = make_router("xmoe", num_experts=10, routing_dim=3)
    jacobian = torch.autograd.functional.jacobian(lambda h: router.scores(h.unsqueeze(0)).squeeze(0), tokens(1)[0])
    assert jacobian.shape == (10, DIM)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) <= 3
    flat = make_router("switch", num_experts=10)
    assert torch.linalg.matrix_rank(flat.gate.weight) == 10


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gradients_reach_every_router_parameter_and_no_unrouted_expert(gate: str) -> None:
    router, experts = make_router("xmoe", gate=gate), make_experts(8)
    x = tokens(3)
    routing = router(x, batch_context([3], training=True))
    mix(x, routing.assignment, experts).square().sum().backward()
    assert {n for n, p in router.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        "projection.weight",
        "embedding",
        "log_temperature",
    }
    touched = {e for e, p in enumerate(experts) if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == set(routing.choices.reshape(-1).tolist())


def test_the_balance_loss_has_a_fixed_temperature_of_its_own() -> None:
    router, x = make_router("xmoe", balance_temperature=0.5), tokens(12)
    context = batch_context([12], training=True)
    balanced = torch.softmax(router.scores(x) / 0.5, -1)
    fraction = torch.bincount(router.scores(x).argmax(-1), minlength=8) / 12
    expected = 8 * (fraction * balanced.mean(0)).sum()
    torch.testing.assert_close(router(x, context).losses["balance_loss"].value, expected)
    with torch.no_grad():
        router.log_temperature.fill_(1.0)
    torch.testing.assert_close(router(x, context).losses["balance_loss"].value, expected)
    router(x, context).losses["balance_loss"].value.backward()
    assert router.log_temperature.grad is None or router.log_temperature.grad == 0


def test_balance_is_one_at_uniform_loads_and_scores() -> None:
    """Experts at the corners of a cross: every token is as near to one as its mirror image is to another."""
    router = make_router("xmoe", dim=2, num_experts=4, routing_dim=2)
    with torch.no_grad():
        router.projection.weight.copy_(torch.eye(2))
        router.embedding.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    x = router.embedding.detach().repeat(5, 1)
    loss = router(x, batch_context([20], training=True)).losses["balance_loss"].value
    assert loss.item() == pytest.approx(1)


def test_frozen_values_stay_and_the_balance_loss_still_trains_what_is_below() -> None:
    router, experts, x = make_router("xmoe", frozen=True), make_experts(8), tokens(6).requires_grad_()
    assert router.config.frozen
    for parameter in [*router.parameters(), *experts]:
        parameter.requires_grad_(False)  # what the layer does to a frozen block
    before = {n: p.clone() for n, p in router.state_dict().items()}
    loss, routing = objective(router, experts, x, batch_context([6], training=True))
    routing.losses["balance_loss"].value.backward()
    assert routing.losses["balance_loss"].value.item() > 0
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert all(torch.equal(before[n], p) for n, p in router.state_dict().items())
    assert loss.requires_grad


def test_torchscale_leaves_the_token_unnormalised_and_takes_two() -> None:
    router, x = make_router("xmoe", mode="torchscale"), tokens(9)
    assert {n for n, _ in router.named_parameters()} == {"projection.weight", "embedding"}
    assert router.embedding.shape == (8, 16)
    context = batch_context([9])
    short, long = router(x, context), router(3 * x, context)
    assert torch.equal(short.choices, long.choices)
    assert not torch.allclose(short.assignment.weight, long.assignment.weight)
    with torch.no_grad():
        router.embedding.mul_(5)
    torch.testing.assert_close(router(x, context).assignment.weight, short.assignment.weight)
    torch.testing.assert_close(short.assignment.weight.view(9, 2).sum(-1), torch.ones(9, dtype=torch.float64))
    trained = router(x, batch_context([9], training=True))
    assert all(1 <= len(p) <= 2 for p in pairs_by_token(trained, 9))


def test_accounting() -> None:
    router = strategy("xmoe").router
    config = routing_config({"name": "xmoe", "num_experts": 32})
    assert config.dim == 16
    assert router.experts_per_token(config) == 1
    assert router.router_flops_per_token(config, 768) == 2 * 16 * (768 + 32)
    assert router.experts_per_token(routing_config({"name": "xmoe", "mode": "torchscale"})) == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mode": "torchscale", "gate": "sigmoid"}, ["torchscale", "routing.mode=paper"]),
        ({"mode": "torchscale", "initial_temperature": 0.1}, ["torchscale", "temperature"]),
        ({"mode": "torchscale", "num_experts": 1}, ["two experts"]),
        ({"balance_temperature": 0.0}, ["routing.balance_temperature", "above 0"]),
        ({"routing_dim": -1}, ["routing.routing_dim"]),
        ({"mode": "torch_scale"}, ["'torchscale'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "xmoe", **keys})
    for word in words:
        assert word in str(caught.value)
