"""Top-k: GShard's weights, policies and priorities; sigmoid scores and the balancing bias."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import RoutingStatistics, routing_config, strategy
from moe_train.routing.noise import score_noise
from moe_train.routing.token_choice import best_experts
from tests.routing.helpers import batch_context, make_router, pairs_by_token, shares, tokens


def probabilities_of(router: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ router.gate.weight.T, -1)


def test_weights_are_the_chosen_probabilities_over_their_sum() -> None:
    router, x = make_router("top_k", num_experts=5), tokens(8)
    routing = router(x, batch_context([8]))
    best, experts = probabilities_of(router, x).topk(2)
    assert torch.equal(routing.choices, experts)
    torch.testing.assert_close(routing.assignment.weight.view(8, 2), best / best.sum(-1, keepdim=True))
    assert routing.assignment.token.view(8, 2).tolist() == [[t, t] for t in range(8)]


@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 99))
def test_the_best_are_those_of_a_sort(count: int, k: int, seed: int) -> None:
    scores = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))
    scores[:, 5] = scores[:, 0]  # a tie: either may come first, but each once
    found = best_experts(scores, k)
    assert torch.equal(scores.gather(1, found), scores.topk(k).values)
    assert all(len(set(row)) == k for row in found.tolist())


def test_one_expert_is_switch() -> None:
    router, x = make_router("top_k", top_k=1, normalise="none"), tokens(8)
    switch = make_router("switch")
    switch.load_state_dict(router.state_dict())
    context = batch_context([8], training=True)
    assert pairs_by_token(router(x, context), 8) == pairs_by_token(switch(x, context), 8)


@pytest.mark.parametrize(("normalise", "first"), [("after_drop", 1.0), ("before_drop", None), ("none", None)])
def test_what_is_left_of_a_dropped_second_choice(normalise: str, first: float | None) -> None:
    """Capacity 2 with two first choices per expert: every second choice is dropped."""
    router = make_router("top_k", num_experts=2, capacity_factor=0.5, normalise=normalise)
    x = torch.cat((tokens(2), -tokens(2)))
    router.gate.weight.data[0] = tokens(2).sum(0)
    router.gate.weight.data[1] = -tokens(2).sum(0)
    routing = router(x, batch_context([4], training=True))
    assert routing.kept.tolist() == [[True, False]] * 4
    best = probabilities_of(router, x).amax(-1)  # with two experts g₁ + g₂ = 1
    torch.testing.assert_close(routing.assignment.weight, best if first is None else torch.ones_like(best))


def test_sampling_draws_the_second_from_the_softmax_without_the_first() -> None:
    router = make_router("top_k", num_experts=4, second_expert="sampling")
    x = tokens(1).repeat(20_000, 1)
    choices = router(x, batch_context([20_000], training=True)).choices
    p = probabilities_of(router, x[:1]).squeeze(0)
    first = int(p.argmax())
    assert (choices[:, 0] == first).all()
    expected = p.clone()
    expected[first] = 0
    expected /= expected.sum()
    found = torch.bincount(choices[:, 1], minlength=4) / 20_000
    torch.testing.assert_close(found.double(), expected, atol=0.012, rtol=0)


@pytest.mark.parametrize("normalise", ["none", "before_drop", "after_drop"])
def test_random_keeps_the_second_with_twice_its_weight(normalise: str) -> None:
    router = make_router("top_k", num_experts=4, second_expert="random", normalise=normalise)
    x = tokens(1).repeat(20_000, 1)
    routing = router(x, batch_context([20_000], training=True))
    best = probabilities_of(router, x[:1]).squeeze(0).topk(2).values
    chance = 2 * best[1] / best.sum() if normalise == "before_drop" else 2 * best[1]
    taken = routing.choices[:, 1] >= 0
    assert taken.double().mean().item() == pytest.approx(min(1.0, chance.item()), abs=0.012)
    assert torch.equal(routing.kept, torch.stack((torch.ones_like(taken), taken), 1))


@given(st.integers(0, 999), st.integers(2, 6), st.sampled_from(["none", "before_drop", "after_drop"]))
@settings(max_examples=25)
def test_weights_beside_a_second_expert_that_was_left_out(seed: int, num_experts: int, normalise: str) -> None:
    """g₁/(g₁+g₂) where weights are normalised before (fairseq's and torchscale's top2gating), 1 only after."""
    router = make_router("top_k", seed=seed, num_experts=num_experts, second_expert="random", normalise=normalise)
    x = tokens(40, seed=seed)
    routing = router(x, batch_context([40], training=True))
    best = probabilities_of(router, x).topk(2)
    alone = routing.choices[:, 1] < 0
    if normalise == "none":
        expected = best.values
    elif normalise == "before_drop":
        expected = best.values / best.values.sum(-1, keepdim=True)
    else:
        expected = torch.where(routing.kept, best.values, 0.0)
        expected = expected / expected.sum(-1, keepdim=True)
    assignment = routing.assignment
    torch.testing.assert_close(assignment.weight, expected[routing.kept], check_dtype=False)
    lonely = assignment.weight[alone[assignment.token]]
    if lonely.numel():
        (gradient,) = torch.autograd.grad(lonely.sum(), router.gate.weight)
        assert bool(gradient.abs().max() > 1e-12) == (normalise != "after_drop"), "a weight of 1 teaches nothing"


@pytest.mark.parametrize("name", ["top_k", "expert_choice"])
def test_score_noise_is_normal_over_the_number_of_experts_and_absent_at_evaluation(name: str) -> None:
    router, x = make_router(name, score_noise=2.0), tokens(5000)
    noise = score_noise(torch.zeros(5000, 8, dtype=torch.float64), 2.0, batch_context([5000], training=True))
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    assert noise.std().item() == pytest.approx(2 / 8, rel=0.02)
    assert noise.abs().lt(0.25).double().mean().item() == pytest.approx(0.6827, abs=0.01)  # within one std
    plain = make_router(name)
    plain.load_state_dict(router.state_dict())
    for training in (False, True):
        context = batch_context([5000], training=training)
        same = torch.equal(router(x, context).choices, plain(x, context).choices)
        assert same is not training


def test_vmoes_losses_look_at_probabilities_and_at_chances_under_the_noise() -> None:
    keys = {"score_noise": 1.0, "importance_weight": 0.5, "load_weight": 0.25, "normalise": "none"}
    router, x = make_router("top_k", **keys), tokens(30)
    context = batch_context([30], training=True)
    losses = shares(router(x, context))
    logits = x @ router.gate.weight.T
    amounts = torch.softmax(logits, -1).sum(0)
    torch.testing.assert_close(losses["importance_loss"].value, (amounts.std(correction=0) / amounts.mean()) ** 2)
    threshold = score_noise(logits, 1.0, context).topk(2).values[:, -1:]
    loads = torch.distributions.Normal(0, 1 / 8).cdf(logits - threshold).sum(0)
    torch.testing.assert_close(losses["load_loss"].value, (loads.std(correction=0) / loads.mean()) ** 2)
    assert (losses["importance_loss"].weight, losses["load_loss"].weight) == (0.5, 0.25)
    assert not router(x, batch_context([30])).losses


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_evaluation_takes_the_best_whatever_the_policy(policy: str) -> None:
    x, context = tokens(50), batch_context([50])
    chosen = make_router("top_k", second_expert=policy)(x, context)
    assert pairs_by_token(chosen, 50) == pairs_by_token(make_router("top_k")(x, context), 50)


def test_the_balance_loss_looks_at_first_choices() -> None:
    """GShard's c_e, before drops; top-3 of one gate has the same as top-1."""
    x, context = tokens(30), batch_context([30], training=True)
    routers = [make_router("top_k", top_k=k, capacity_factor=0.5, normalise="none") for k in (1, 3)]
    routers[1].load_state_dict(routers[0].state_dict())
    one, three = (router(x, context) for router in routers)
    assert int(three.statistics.dropped) > 0
    torch.testing.assert_close(shares(three)["balance_loss"].value, shares(one)["balance_loss"].value)
    p = probabilities_of(routers[0], x)
    first = torch.bincount(p.argmax(-1), minlength=8) / 30
    torch.testing.assert_close(shares(one)["balance_loss"].value, 8 * (first * p.mean(0)).sum())


def test_sigmoid_scores_are_independent_of_each_other() -> None:
    router, x = make_router("top_k", scores="sigmoid", normalise="none"), tokens(6)
    best = torch.sigmoid(x @ router.gate.weight.T).topk(2).values
    torch.testing.assert_close(router(x, batch_context([6])).assignment.weight.view(6, 2), best)


def test_the_bias_steers_selection_and_leaves_weights_alone() -> None:
    router, x = make_router("top_k", balancing_bias_rate=0.5, normalise="none", num_experts=4), tokens(10)
    router.balancing_bias[3] = 10.0
    routing = router(x, batch_context([10]))
    assert (routing.choices == 3).any(dim=1).all()
    p = probabilities_of(router, x)
    torch.testing.assert_close(routing.assignment.weight.view(10, 2), p.gather(1, routing.choices))


def test_the_bias_learns_from_loads_and_is_kept_in_the_state() -> None:
    router, x = make_router("top_k", balancing_bias_rate=0.1, num_experts=4), tokens(40)
    statistics = router(x, batch_context([40], training=True)).statistics
    router.after_update(statistics)
    requested = statistics.requested.double()
    torch.testing.assert_close(router.state_dict()["balancing_bias"], 0.1 * torch.sign(requested.mean() - requested))
    assert "balancing_bias" not in make_router("top_k").state_dict()


def test_the_bias_levels_a_collapsed_router() -> None:
    """An expert that no token chooses at first gets its share after enough updates."""
    router, x = make_router("top_k", balancing_bias_rate=0.004, num_experts=4, top_k=1, normalise="none"), tokens(400)
    x[:, 0] = 1.0
    router.gate.weight.data[:, 0] = torch.tensor([3.0, 0, 0, -3.0])
    context = batch_context([400], training=True)
    before = router(x, context).statistics
    for _ in range(600):
        router.after_update(router(x, context).statistics)
    after = router(x, context).statistics
    assert before.load.max() > 300
    assert after.load.max() < 150 and after.load.min() > 50
    empty = dataclasses.replace(after, requested=torch.zeros(4, dtype=torch.int64))
    bias = router.balancing_bias.clone()
    router.after_update(RoutingStatistics(**vars(empty)))
    assert torch.equal(bias, router.balancing_bias), "no loads, no step"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"top_k": 9}, ["routing.top_k=9", "8"]),
        ({"top_k": 0}, ["routing.top_k", "above 0"]),
        ({"top_k": 1}, ["learns nothing", "routing.normalise=none"]),
        ({"top_k": 3, "second_expert": "random"}, ["two experts"]),
        ({"shared_expert": True, "expert_sublayers": 3}, ["routing.shared_expert", "expert_sublayers=1"]),
        ({"second_expert": "sampled"}, ["routing.second_expert", "'sampling'"]),
        ({"capacity_factor": -1.0}, ["routing.capacity_factor", "above 0"]),
        ({"balance_weight": -0.1}, ["routing.balance_weight"]),
        ({"expert_output_masking": 1.0}, ["routing.expert_output_masking"]),
        ({"load_weight": 0.1}, ["routing.load_weight", "routing.score_noise=1.0"]),
        ({"load_weight": 0.1, "score_noise": 1.0, "second_expert": "random"}, ["routing.second_expert=all"]),
        ({"importance_weight": -0.1}, ["routing.importance_weight"]),
        ({"jiter": 0.1}, ["routing.jiter", "'jitter'"]),
        ({"num_experts": 0}, ["routing.num_experts"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "top_k", **keys})
    for word in words:
        assert word in str(caught.value)


def test_accounting() -> None:
    config = routing_config({"name": "top_k", "top_k": 3})
    assert strategy("top_k").router.experts_per_token(config) == 3
