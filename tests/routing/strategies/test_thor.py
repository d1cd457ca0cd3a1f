"""THOR: random, uniform, paired, repeatable; the invariants of the paper and its two modes of inference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import ConfigError
from moe_train.routing import routing_config, strategy
from tests.routing.helpers import batch_context, make_experts, make_router, mix, tokens

CHI_SQUARE_999 = {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47, 8: 24.32}  # 0.999 quantile by number of experts


def chi_square(experts: torch.Tensor, num_experts: int) -> float:
    counts = torch.bincount(experts.reshape(-1), minlength=num_experts).double()
    expected = counts.sum() / num_experts
    return float(((counts - expected) ** 2 / expected).sum())


def over_updates(router: torch.nn.Module, updates: int, **changes: object) -> torch.Tensor:
    """[updates, 2] the experts of a one-token batch in its two passes."""
    context = batch_context([1], passes=2, training=True, **changes)
    x = tokens(2)
    found = [router(x, dataclasses.replace(context, update=u)).choices.squeeze(1) for u in range(updates)]
    return torch.stack(found)


def test_it_has_no_parameters_and_no_gate() -> None:
    router = make_router("thor")
    assert not list(router.parameters())
    assert not list(router.state_dict())


@pytest.mark.parametrize("pair", ["distinct", "independent"])
def test_a_training_batch_meets_one_expert_per_pass(pair: str) -> None:
    router = make_router("thor", pair=pair, num_experts=4)
    for update in range(20):
        context = batch_context([3, 2, 4], passes=2, training=True, update=update)
        choices = router(tokens(18), context).choices.squeeze(1)
        passes = [choices[context.pass_index == p] for p in (0, 1)]
        assert all(len(p.unique()) == 1 for p in passes)
        assert pair == "independent" or passes[0][0] != passes[1][0]


@pytest.mark.parametrize("pair", ["distinct", "independent"])
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_draws_are_uniform_in_each_pass(pair: str, num_experts: int) -> None:
    drawn = over_updates(make_router("thor", pair=pair, num_experts=num_experts), 1000)
    for pass_index in (0, 1):
        assert chi_square(drawn[:, pass_index], num_experts) < CHI_SQUARE_999[num_experts]
    same = (drawn[:, 0] == drawn[:, 1]).double().mean().item()
    assert same == (0 if pair == "distinct" else pytest.approx(1 / num_experts, abs=0.06))


def test_distinct_pairs_are_uniform_over_ordered_pairs() -> None:
    drawn = over_updates(make_router("thor", num_experts=3), 1500)
    kind = drawn[:, 0] * 2 + (drawn[:, 1] - drawn[:, 0]) % 3 - 1  # six ordered pairs
    counts = torch.bincount(kind, minlength=6).double()
    assert ((counts - 1500 / 6) ** 2 / (1500 / 6)).sum().item() < 20.5  # 0.999 quantile, 5 degrees of freedom


def test_draws_differ_between_layers_and_seeds() -> None:
    router = make_router("thor", num_experts=8)
    base = over_updates(router, 200)
    for change in ({"layer": 1}, {"seed": 2}):
        other = over_updates(router, 200, **change)
        assert (base == other).double().mean().item() < 0.3


def test_one_expert_draws_itself_in_both_passes() -> None:
    assert not over_updates(make_router("thor", num_experts=1), 5).any()


def touched_by(pair: str, num_experts: int, update: int) -> set[int]:
    """The experts that get a gradient in one update; those that were drawn, or the test fails here."""
    router, experts = make_router("thor", num_experts=num_experts, pair=pair), make_experts(num_experts)
    context = batch_context([3, 4], passes=2, training=True, update=update)
    routing = router(tokens(14), context)
    mix(tokens(14), routing.assignment, experts).sum().backward()
    touched = {e for e, p in enumerate(experts) if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == set(routing.choices.unique().tolist())
    assert not routing.losses
    return touched


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=20)
def test_only_the_two_drawn_experts_get_gradients(num_experts: int, update: int) -> None:
    assert len(touched_by("distinct", num_experts, update)) == 2


def test_independent_passes_give_gradients_to_one_expert_or_two() -> None:
    """One with probability 1/N: 50 draws of three experts make both cases certain to 1e-8."""
    assert {len(touched_by("independent", 3, update)) for update in range(50)} == {1, 2}


def test_sentences_keep_their_expert_and_differ_from_each_other() -> None:
    router = make_router("thor", inference="sentence", num_experts=4)
    context = batch_context([5] * 40)
    choices = router(tokens(200), context).choices.view(40, 5)
    assert (choices == choices[:, :1]).all()
    assert len(choices[:, 0].unique()) == 4
    assert chi_square(choices[:, 0], 4) < CHI_SQUARE_999[4]


@given(st.permutations(range(6)))
def test_permuting_the_batch_permutes_the_choices(order: list[int]) -> None:
    router = make_router("thor", inference="sentence")
    context = batch_context([2] * 6)
    uid = context.sentence_uid.view(6, 2)[order].reshape(-1)
    plain = router(tokens(12), context).choices.view(6, 2)
    permuted = router(tokens(12), dataclasses.replace(context, sentence_uid=uid)).choices.view(6, 2)
    assert torch.equal(plain[order], permuted)


def test_beams_inherit_the_uid_and_so_the_expert() -> None:
    """Five beams of one sentence, as rows of a step-by-step batch at any position."""
    router = make_router("thor", inference="sentence")
    for position in (0, 1, 17):
        context = batch_context([1] * 5)
        uid, where = torch.full((5,), 42), torch.full((5,), position)
        context = dataclasses.replace(context, sentence_uid=uid, position=where)
        assert len(router(tokens(5), context).choices.unique()) == 1


def test_tokens_draw_independently_where_asked() -> None:
    router = make_router("thor", inference="token", num_experts=4)
    choices = router(tokens(4000), batch_context([20] * 200)).choices.view(200, 20)
    assert chi_square(choices, 4) < CHI_SQUARE_999[4]
    neighbours = choices[:, :-1] * 4 + choices[:, 1:]
    counts = torch.bincount(neighbours.reshape(-1), minlength=16).double()
    expected = counts.sum() / 16
    assert ((counts - expected) ** 2 / expected).sum().item() < 37.7  # 0.999 quantile, 15 degrees of freedom


def test_a_fixed_expert_depends_on_seed_and_layer_only() -> None:
    router = make_router("thor", inference="fixed", num_experts=4)
    contexts = [batch_context([20] * 3, update=u, layer=n, seed=s) for u in (0, 9) for n in range(40) for s in (1, 2)]
    choices = [router(tokens(60), context).choices for context in contexts]
    assert all(len(found.unique()) == 1 for found in choices)
    first = [int(found[0, 0]) for found in choices]
    assert first[:80] == first[80:], "not on the update"
    assert set(first[::2]) == {0, 1, 2, 3} and first[::2] != first[1::2]
    assert first == [router.fixed_expert(context.seed, context.layer) for context in contexts]
    training = router(tokens(60), batch_context([20] * 3, training=True, update=3)).choices
    assert len(training.unique()) == 1 and make_router("thor").fixed_expert(1, 0) is None


def test_the_official_sentence_level_is_a_position_level() -> None:
    router = make_router("thor", inference="position", num_experts=4)
    choices = router(tokens(60), batch_context([20] * 3)).choices.view(3, 20)
    assert (choices == choices[:1]).all()
    assert len(choices[0].unique()) > 1


def test_the_ensemble_is_the_mean_of_all_experts_whatever_the_seed() -> None:
    router, experts, x = make_router("thor", inference="ensemble", num_experts=3), make_experts(3), tokens(7)
    outputs = [mix(x, router(x, batch_context([7], seed=s)).assignment, experts) for s in (1, 2)]
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], torch.stack([torch.tanh(x @ w) for w in experts]).mean(0))


@given(
    st.sampled_from(["token", "sentence", "position", "ensemble"]),
    st.integers(1, 8),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 999),
)
@settings(max_examples=25)
def test_equal_experts_make_mode_and_seed_irrelevant(
    inference: str, num_experts: int, lengths: list[int], seed: int
) -> None:
    experts = make_experts(num_experts)
    for weight in experts:
        weight.data.copy_(experts[0].data)
    x, context = tokens(sum(lengths), seed=seed), batch_context(lengths, seed=seed)
    assignment = make_router("thor", inference=inference, num_experts=num_experts)(x, context).assignment
    torch.testing.assert_close(mix(x, assignment, experts), torch.tanh(x @ experts[0]))


def test_accounting_and_defaults() -> None:
    router = strategy("thor").router
    config = routing_config({"name": "thor", "num_experts": 6})
    assert (config.passes, config.consistency_weight) == (2, 5.0)
    assert router.experts_per_token(config) == 1
    assert router.experts_per_token(routing_config({"name": "thor", "num_experts": 6, "inference": "ensemble"})) == 6
    assert router.router_flops_per_token(config, 512) == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"passes": 1}, ["consistency_weight", "passes=2"]),
        ({"passes": 3}, ["routing.passes"]),
        ({"inference": "sentences"}, ["routing.inference", "'sentence'"]),
        ({"draw": "batches"}, ["'batch'"]),
    ],
)
def test_wrong_use_is_named_with_a_remedy(keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_config({"name": "thor", **keys})
    for word in words:
        assert word in str(caught.value)
