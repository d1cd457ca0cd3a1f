"""X-MoE: cosine scores, temperature, balance at its own temperature, freezing; and torchscale's departures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import routing_config, strategy
from tests.routing.helpers import (
    DIM,
    batch_context,
    make_experts,
    make_router,
    mix,
    objective,
    pairs_by_token,
    shares,
    tokens,
)

scale = st.floats(0.01, 100)
scales = st.lists(scale, min_size=8, max_size=8)


def weights_of(router: Any, x: torch.Tensor) -> torch.Tensor:
    return router(x, batch_context([x.shape[0]])).assignment.weight.detach()


def lengthen(router: Any, factors: list[float]) -> None:
    """Multiplies each expert's embedding by a different factor."""
    with torch.no_grad():
        router.embedding.mul_(torch.tensor(factors, dtype=torch.float64).unsqueeze(1))


def gates_of(router: Any, x: torch.Tensor) -> torch.Tensor:
    """softmax(z · e_i / ‖e_i‖), torchscale's gates, [T, E]."""
    embedding = router.embedding / router.embedding.norm(dim=-1, keepdim=True)
    return torch.softmax(x @ router.projection.weight.T @ embedding.T, -1)


@given(scale, scales, st.integers(0, 100), st.sampled_from(["softmax", "sigmoid"]))
@settings(max_examples=25)
def test_lengths_of_tokens_and_embeddings_do_not_matter(c: float, e: list[float], seed: int, gate: str) -> None:
    router, x = make_router("xmoe", gate=gate), tokens(9, seed=seed)
    context = batch_context([9])
    before = router(x, context)
    lengthen(router, e)
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


@given(st.sampled_from([("softmax", 0.3), ("sigmoid", 0.07)]), st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=20)
def test_the_gate_follows_its_equation_and_tau_starts_at_tau_0(
    start: tuple[str, float], num_experts: int, seed: int
) -> None:
    gate, tau = start
    router, x = make_router("xmoe", seed=seed, gate=gate, num_experts=num_experts), tokens(5, seed=seed)
    assert router.temperature.item() == pytest.approx(tau, rel=1e-6)
    z = x @ router.projection.weight.T
    cosine = z @ router.embedding.T / (z.norm(dim=-1, keepdim=True) * router.embedding.norm(dim=-1))
    logits = cosine / router.temperature
    expected = (torch.sigmoid(logits) if gate == "sigmoid" else torch.softmax(logits, -1)).gather(
        1, cosine.argmax(-1, keepdim=True)
    )
    torch.testing.assert_close(weights_of(router, x), expected.squeeze(1).detach())


@given(st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=15)
def test_the_router_moves_hidden_states_in_few_dimensions_only(routing_dim: int, seed: int) -> None:
    """§3.1: the rank of the scores' Jacobian by h is at most d_e."""
    router = make_router("xmoe", seed=seed, num_experts=10, routing_dim=routing_dim)
    jacobian = torch.autograd.functional.jacobian(
        lambda h: router.scores(h.unsqueeze(0)).squeeze(0), tokens(1, seed=seed)[0]
    )
    assert jacobian.shape == (10, DIM)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) <= routing_dim
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
    torch.testing.assert_close(shares(router(x, context))["balance_loss"].value, expected)
    with torch.no_grad():
        router.log_temperature.fill_(1.0)
    torch.testing.assert_close(shares(router(x, context))["balance_loss"].value, expected)
    shares(router(x, context))["balance_loss"].value.backward()
    assert router.log_temperature.grad is None or router.log_temperature.grad == 0


def test_balance_is_one_at_uniform_loads_and_scores() -> None:
    """Experts at the corners of a cross: every token is as near to one as its mirror image is to another."""
    router = make_router("xmoe", dim=2, num_experts=4, routing_dim=2)
    with torch.no_grad():
        router.projection.weight.copy_(torch.eye(2))
        router.embedding.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    x = router.embedding.detach().repeat(5, 1)
    loss = shares(router(x, batch_context([20], training=True)))["balance_loss"].value
    assert loss.item() == pytest.approx(1)


def test_frozen_values_stay_and_the_balance_loss_still_trains_what_is_below() -> None:
    router, experts, x = make_router("xmoe", frozen=True), make_experts(8), tokens(6).requires_grad_()
    assert router.config.frozen
    for parameter in [*router.parameters(), *experts]:
        parameter.requires_grad_(False)  # what the layer does to a frozen block
    before = {n: p.clone() for n, p in router.state_dict().items()}
    loss, routing = objective(router, experts, x, batch_context([6], training=True))
    shares(routing)["balance_loss"].value.backward()
    assert shares(routing)["balance_loss"].value.item() > 0
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert all(torch.equal(before[n], p) for n, p in router.state_dict().items())
    assert loss.requires_grad


def test_torchscale_has_no_temperature_and_takes_two() -> None:
    router, x = make_router("xmoe", mode="torchscale"), tokens(9)
    assert {n for n, _ in router.named_parameters()} == {"projection.weight", "embedding"}
    assert router.embedding.shape == (8, 16)
    short, long = (router(factor * x, batch_context([9])) for factor in (1, 3))
    assert not torch.allclose(short.assignment.weight, long.assignment.weight), "the token's length is a temperature"
    assert all(len(p) == 2 for p in pairs_by_token(short, 9))


@given(scale, scales, st.integers(0, 100), st.booleans())
@settings(max_examples=25)
def test_torchscale_ignores_lengths_of_embeddings_and_chooses_regardless_of_token_lengths(
    c: float, e: list[float], seed: int, training: bool
) -> None:
    router, x = make_router("xmoe", seed=seed, mode="torchscale"), tokens(9, seed=seed)
    context = batch_context([9], training=training)
    before, other = router(x, context), router(c * x, batch_context([9]))
    assert torch.equal(other.choices, router(x, batch_context([9])).choices), (
        "evaluation: no draws that look at weights"
    )
    lengthen(router, e)
    after = router(x, context)
    assert torch.equal(before.choices, after.choices)
    torch.testing.assert_close(before.assignment.weight, after.assignment.weight, rtol=1e-9, atol=0)


@given(st.integers(0, 999), st.booleans())
@settings(max_examples=20)
def test_torchscale_normalises_before_it_draws_the_second_expert(seed: int, training: bool) -> None:
    """g₁/(g₁+g₂) for the first expert whether or not the second is taken, so that the gate learns from every token."""
    router, x = make_router("xmoe", seed=seed, mode="torchscale"), tokens(40, seed=seed)
    routing = router(x, batch_context([40], training=training))
    best = gates_of(router, x).topk(2).values
    expected = best / best.sum(-1, keepdim=True)
    assignment = routing.assignment
    torch.testing.assert_close(assignment.weight, expected[routing.kept])
    alone = routing.choices[:, 1] < 0
    assert training or not alone.any()
    lonely = assignment.weight[alone[assignment.token]]
    if lonely.numel():
        gradients = torch.autograd.grad(lonely.sum(), list(router.parameters()))
        assert all(g.abs().max() > 1e-12 for g in gradients)


def test_torchscale_rounds_a_capacity_as_fairseq_does() -> None:
    for mode, limit in (("torchscale", 4), ("paper", 2)):  # 2 · ⌈9 / 8⌉, and ⌈9 / 8⌉ of one choice
        router = make_router("xmoe", mode=mode, capacity_factor=1.0)
        load = router(tokens(1).repeat(9, 1), batch_context([9], training=True)).statistics.load
        assert load.max() == limit, mode


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
        ({"mode": "torchscale", "balance_temperature": 0.1}, ["torchscale", "temperature"]),
        ({"mode": "torchscale", "num_experts": 1}, ["two experts"]),
        ({"balance_temperature": 0.0}, ["routing.balance_temperature", "0.0001 or more"]),
        ({"routing_dim": -1}, ["routing.routing_dim"]),
        ({"mode": "torch_scale"}, ["'torchscale'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "xmoe", **keys})
    for word in words:
        assert word in str(caught.value)
