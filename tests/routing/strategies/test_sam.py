"""SAM: k experts in one group, its limits (Switch, flat top-k), balance at both levels, alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import build_router, resolve, routing_config, strategy
from moe_train.routing.base import RouterInputs
from moe_train.routing.strategies.sam import alignment
from tests.routing.helpers import (
    DIM,
    assert_same_pairs,
    batch_context,
    make_experts,
    make_router,
    mix,
    pairs_by_token,
    shares,
    tokens,
)

shapes = st.sampled_from([(8, 4, 2), (8, 2, 4), (12, 3, 2), (6, 6, 1), (6, 1, 3), (9, 3, 3)])
both_forms = pytest.mark.parametrize("matrices", ["shared", "two"])


@given(shapes, st.sampled_from(["shared", "two"]), st.integers(0, 100))
def test_all_experts_of_a_token_stand_in_one_group(shape: tuple[int, int, int], matrices: str, seed: int) -> None:
    num_experts, groups, k = shape
    router = make_router("sam", seed=seed, num_experts=num_experts, num_groups=groups, top_k=k, matrices=matrices)
    x = tokens(15, seed=seed)
    routing = router(x, batch_context([15], training=True))
    group = routing.choices // (num_experts // groups)
    assert (group == group[:, :1]).all()
    levels = router.levels(x)
    assert torch.equal(group[:, 0], levels.group.argmax(-1))
    torch.testing.assert_close(levels.group.sum(-1), torch.ones(15, dtype=torch.float64))
    torch.testing.assert_close(levels.expert.sum(-1), torch.ones(15, dtype=torch.float64))
    torch.testing.assert_close(routing.assignment.weight.view(15, k), levels.expert.gather(1, routing.choices))
    inside = router.by_group(levels.expert)[torch.arange(15), group[:, 0]]
    torch.testing.assert_close(inside.topk(k).values, levels.expert.gather(1, routing.choices))


def gate_of(router: Any, two: str) -> torch.nn.Parameter:
    """The matrix that decides: the shared one, or that of the level ``two``."""
    weight: torch.nn.Parameter = (router.gate if router.config.matrices == "shared" else getattr(router, two)).weight
    return weight


def outcome(router: Any, gate: torch.nn.Parameter, x: torch.Tensor) -> list[torch.Tensor]:
    """The layer's outputs, and gradients of tokens, gate and experts."""
    experts, x = make_experts(router.num_experts), x.clone().requires_grad_()
    y = mix(x, router(x, batch_context([x.shape[0]], training=True)).assignment, experts)
    objective = (y * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum() + y.square().sum()
    return [y, *torch.autograd.grad(objective, [x, gate, *experts])]


@given(st.integers(1, 9), st.sampled_from(["shared", "two"]), st.integers(1, 20), st.integers(0, 200))
@settings(max_examples=25)
def test_one_expert_per_group_is_switch(num_experts: int, matrices: str, count: int, seed: int) -> None:
    """k = 1 and G = E: the same outputs, gradients and balance."""
    keys = {"num_experts": num_experts, "num_groups": num_experts, "top_k": 1, "matrices": matrices}
    sam, switch = make_router("sam", seed=seed, **keys), make_router("switch", num_experts=num_experts)
    x, gate = tokens(count, seed=seed), gate_of(sam, "switch")
    switch.gate.weight.data.copy_(gate)
    torch.testing.assert_close(outcome(sam, gate, x), outcome(switch, switch.gate.weight, x), rtol=1e-9, atol=1e-12)
    context = batch_context([count], training=True)
    found, expected = sam(x, context), switch(x, context)
    assert_same_pairs(found, expected, count)
    for name in ("balance_loss", "group_balance_loss"):
        torch.testing.assert_close(shares(found)[name].value, shares(expected)["balance_loss"].value)
    assert shares(found)["alignment_loss"].value.item() == 0


@given(st.integers(1, 9), st.data(), st.sampled_from(["shared", "two"]), st.integers(1, 20), st.integers(0, 200))
@settings(max_examples=25)
def test_one_group_is_flat_top_k_with_nothing_to_align(
    num_experts: int, data: st.DataObject, matrices: str, count: int, seed: int
) -> None:
    """G = 1, any k: the same outputs and gradients; no expert is outside the group."""
    k = data.draw(st.integers(1, num_experts), label="k")
    keys = {"num_experts": num_experts, "top_k": k}
    sam = make_router("sam", seed=seed, num_groups=1, matrices=matrices, **keys)
    flat = make_router("top_k", normalise="none", **keys)
    x, gate = tokens(count, seed=seed), gate_of(sam, "mixture")
    flat.gate.weight.data.copy_(gate)
    torch.testing.assert_close(outcome(sam, gate, x), outcome(flat, flat.gate.weight, x), rtol=1e-9, atol=1e-12)
    context = batch_context([count], training=True)
    found = sam(x, context)
    assert_same_pairs(found, flat(x, context), count)
    loss = shares(found)["alignment_loss"].value
    assert loss.item() == 0
    assert not any(
        g.any() for g in torch.autograd.grad(loss, list(sam.parameters()), allow_unused=True) if g is not None
    )


@given(
    st.integers(0, 200),
    shapes,
    st.sampled_from(["shared", "two"]),
    st.sampled_from(["outside", "both"]),
)
@settings(max_examples=40)
def test_alignment_is_zero_exactly_where_no_outsider_beats_a_chosen_one(
    seed: int, shape: tuple[int, int, int], matrices: str, gradient: str
) -> None:
    """Token by token, and so is its gradient at the logits of either form."""
    num_experts, groups, k = shape
    keys = {"num_experts": num_experts, "num_groups": groups, "top_k": k, "alignment_gradient": gradient}
    router, x = make_router("sam", seed=seed, matrices=matrices, **keys), tokens(10, seed=seed)
    logits: list[torch.Tensor] = []
    for gate in (router.gate,) if matrices == "shared" else (router.switch, router.mixture):
        gate.register_forward_hook(lambda _module, _inputs, scores: logits.append(scores))
    routing = router(x, batch_context([10], training=True))
    seen = list(logits)
    probabilities = router.levels(x).expert
    weakest = probabilities.gather(1, routing.choices).amin(-1, keepdim=True)
    size = num_experts // groups
    outside = torch.arange(num_experts) // size != routing.choices[:, :1] // size
    excess = torch.where(outside, (probabilities - weakest).clamp(min=0), 0.0).sum(-1)
    loss = shares(routing)["alignment_loss"].value
    torch.testing.assert_close(loss, excess.mean())
    assert (loss > 0).item() == (excess > 0).any().item()
    by_token = torch.cat(torch.autograd.grad(loss, seen), dim=1).abs().sum(1)
    assert not by_token[excess == 0].any()
    assert (by_token[excess > 0] > 0).all()


def test_the_alignment_gradient_stops_where_asked() -> None:
    expert = torch.tensor([[0.3, 0.25, 0.35, 0.1]], dtype=torch.float64, requires_grad=True)
    choices = torch.tensor([[0, 1]])
    for both, expected in ((False, [0, 0, 1, 0]), (True, [0, -1, 1, 0])):
        value = alignment(expert, choices, expert.gather(1, choices), 2, both=both)
        assert value.item() == pytest.approx(0.1)
        (gradient,) = torch.autograd.grad(value.sum(), expert)
        assert gradient.tolist() == [expected]


def test_the_alignment_loss_is_a_mean_over_tokens() -> None:
    router, x = make_router("sam"), tokens(7)
    once = shares(router(x, batch_context([7], training=True)))["alignment_loss"].value
    twice = shares(router(torch.cat((x, x)), batch_context([7, 7], training=True)))["alignment_loss"].value
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_k_over_experts_and_one_over_groups_at_uniform(k: int) -> None:
    router = make_router("sam", num_groups=2, top_k=k)
    with torch.no_grad():
        router.gate.weight.zero_()
    found = shares(router(tokens(16), batch_context([16], training=True)))
    assert found["balance_loss"].value.item() == pytest.approx(k), "P is uniform, so f does not matter"
    assert found["group_balance_loss"].value.item() == pytest.approx(1)


def test_balance_sums_over_the_choices() -> None:
    router, x = make_router("sam", num_groups=2, top_k=3), tokens(11)
    routing = router(x, batch_context([11], training=True))
    mean = router.levels(x).expert.mean(0)
    ranks = [torch.bincount(routing.choices[:, r], minlength=8) / 11 for r in range(3)]
    expected = sum(8 * (f * mean).sum() for f in ranks)
    torch.testing.assert_close(shares(routing)["balance_loss"].value, expected)
    groups = torch.bincount(routing.choices[:, 0] // 4, minlength=2) / 11
    expected = 2 * (groups * router.levels(x).group.mean(0)).sum()
    torch.testing.assert_close(shares(routing)["group_balance_loss"].value, expected)


@given(st.permutations(range(4)))
@both_forms
def test_permuting_groups_permutes_assignments_only(matrices: str, order: list[int]) -> None:
    router, other = (make_router("sam", matrices=matrices) for _ in range(2))
    experts = torch.tensor([2 * g + i for g in order for i in (0, 1)])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            original = router.get_parameter(name)
            parameter.copy_(original[torch.tensor(order)] if name == "switch.weight" else original[experts])
    context = batch_context([12], training=True)
    plain, permuted = router(tokens(12), context), other(tokens(12), context)
    assert torch.equal(experts[permuted.choices], plain.choices)
    torch.testing.assert_close(permuted.assignment.weight, plain.assignment.weight)
    for name in plain.losses:
        torch.testing.assert_close(shares(permuted)[name].value, shares(plain)[name].value)


def test_a_full_group_drops_all_choices_of_a_token() -> None:
    router = make_router("sam", num_groups=2, top_k=2, group_capacity_factor=1.0)
    with torch.no_grad():
        router.gate.bias[:4] = 10
    routing = router(tokens(9), batch_context([9], training=True))
    assert routing.kept.tolist() == [[True, True]] * 5 + [[False, False]] * 4  # ceil(9 / 2)
    assert int(routing.statistics.dropped) == 8
    assert router(tokens(9), batch_context([9])).kept.all(), "evaluation drops nothing"


def test_one_destination_per_token_whatever_k() -> None:
    """With a group per device, rows sent per token are one; flat top-k sends up to k."""
    x, context = tokens(50), batch_context([50])
    for k in (1, 2, 4):
        sam = make_router("sam", num_groups=2, top_k=k)(x, context)
        devices = {t: {e // 4 for e in p} for t, p in enumerate(pairs_by_token(sam, 50))}
        assert all(len(d) == 1 for d in devices.values())
    flat = make_router("top_k", top_k=4)(x, context)
    assert any(len({e // 4 for e in p}) == 2 for p in pairs_by_token(flat, 50))


@both_forms
def test_parameters_and_accounting(matrices: str) -> None:
    config = routing_config({"name": "sam", "matrices": matrices, "num_experts": 16, "num_groups": 4, "top_k": 3})
    router = build_router(config, RouterInputs(32))
    count = sum(p.numel() for p in router.parameters())
    assert count == (16 * 32 + 16 if matrices == "shared" else (16 + 4) * 32)
    assert strategy("sam").router.experts_per_token(config) == 3
    assert strategy("sam").router.router_flops_per_token(config, 32) == 2 * 32 * (16 if matrices == "shared" else 20)


def test_groups_per_rank_or_node_become_a_number_at_launch() -> None:
    keys: dict[str, Any] = {"name": "sam", "num_experts": 16, "num_groups": "rank"}
    assert resolve(keys, ranks=8, nodes=2) == {**keys, "num_groups": 8}
    assert resolve({**keys, "num_groups": "node"}, ranks=8, nodes=2)["num_groups"] == 2
    assert resolve({**keys, "num_groups": 4}, ranks=8, nodes=2)["num_groups"] == 4
    assert resolve({"name": "switch", "draw": "rank"}, ranks=8, nodes=2)["draw"] == "rank"
    with pytest.raises(ConfigError, match="no number yet"):
        build_router(routing_config(keys), RouterInputs(12))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_groups": 3}, ["routing.num_groups=3", "does not divide", "8"]),
        ({"num_groups": 4, "top_k": 3}, ["routing.top_k=3", "group", "2"]),
        ({"num_groups": 0}, ["routing.num_groups", "above 0"]),
        ({"num_groups": "ranks"}, ["routing.num_groups"]),
        ({"group_capacity_factor": -1.0}, ["routing.group_capacity_factor"]),
        ({"alignment_weight": -1.0}, ["routing.alignment_weight"]),
        ({"matrices": "shard"}, ["'shared'"]),
        ({"num_group": 2}, ["'num_groups'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "sam", **keys})
    for word in words:
        assert word in str(caught.value)
