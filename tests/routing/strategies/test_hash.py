"""Hash routing: by token id alone, fixed, balanced by frequency; and random routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.routing import routing_config, strategy
from moe_train.routing.strategies.hash import balanced_table
from tests.routing.helpers import batch_context, make_router, tokens

VOCABULARY = 400
ZIPF = (10_000 / (1 + torch.arange(VOCABULARY))).long()


def hash_router(**keys: Any) -> Any:
    inputs = {"vocabulary": VOCABULARY, "token_frequency": ZIPF, **keys.pop("inputs", {})}
    return make_router("hash", inputs=inputs, **keys)


@pytest.mark.parametrize("table", ["balanced", "random"])
def test_the_expert_depends_on_the_id_alone(table: str) -> None:
    router = hash_router(table=table)
    context = batch_context([10, 20], vocabulary=VOCABULARY)
    routing = router(tokens(30), context)
    assert torch.equal(routing.choices.squeeze(1), router.table[context.token_id])
    other = dataclasses.replace(context, update=9, seed=5, training=True)
    again = router(tokens(30, seed=77), other)
    assert torch.equal(routing.choices, again.choices)
    assert (routing.assignment.weight == 1).all()
    assert not routing.losses
    assert not list(router.parameters())


def test_balance_follows_the_training_text() -> None:
    balanced, random = (hash_router(table=t, num_experts=8).table for t in ("balanced", "random"))
    loads = [torch.zeros(8).scatter_add_(0, t, ZIPF.float()) for t in (balanced, random)]
    assert loads[0].max() / loads[0].mean() < 1.3, "the most frequent id alone is nearly an eighth of the text"
    assert loads[0].max() < loads[1].max()
    assert set(balanced.tolist()) == set(range(8))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 6))
def test_the_greedy_table_is_within_the_largest_id_of_even(frequency: list[int], num_experts: int) -> None:
    counts = torch.tensor(frequency)
    table = balanced_table(counts, torch.arange(len(frequency)), num_experts)
    loads = torch.zeros(num_experts, dtype=torch.int64).scatter_add_(0, table, counts)
    assert loads.max() - loads.min() <= counts.max()


def test_without_frequencies_every_expert_has_equally_many_ids() -> None:
    table = make_router("hash", inputs={"vocabulary": 80}, num_experts=8).table
    assert torch.bincount(table).tolist() == [10] * 8


def test_layers_and_seeds_have_tables_of_their_own() -> None:
    base = hash_router(table="random").table
    assert torch.equal(base, hash_router(table="random").table)
    for change in ({"layer": 1}, {"seed": 2}):
        assert (base == hash_router(table="random", inputs=change).table).double().mean().item() < 0.3


def test_a_checkpoint_carries_the_table() -> None:
    router, other = hash_router(table="random"), hash_router(table="random", inputs={"seed": 9})
    other.load_state_dict(router.state_dict())
    context = batch_context([30], vocabulary=VOCABULARY)
    assert torch.equal(router(tokens(30), context).choices, other(tokens(30), context).choices)


def test_tokens_without_an_id_are_hashed_by_position() -> None:
    router = hash_router()
    context = dataclasses.replace(batch_context([50, 50]), token_id=torch.full((100,), -1))
    choices = router(tokens(100), context).choices.view(2, 50)
    assert torch.equal(choices[0], choices[1])
    assert len(choices[0].unique()) > 4
    images = make_router("hash")(tokens(100), context).choices
    assert images.min() >= 0 and images.max() < 8


def test_ids_are_hashed_where_no_vocabulary_is_known() -> None:
    router = make_router("hash")
    first, second = batch_context([50]), batch_context([50], vocabulary=50)
    assert torch.equal(router(tokens(50), first).choices, router(tokens(50), second).choices)


def test_random_draws_are_uniform_and_shared_as_asked() -> None:
    context = batch_context([20] * 100, training=True)
    by = {
        d: make_router("random", draw=d, num_experts=4)(tokens(2000), context) for d in ("token", "sentence", "batch")
    }
    counts = torch.bincount(by["token"].choices.squeeze(1), minlength=4).double()
    assert ((counts - 500) ** 2 / 500).sum().item() < 16.27  # chi-square, 0.999 quantile, 3 degrees of freedom
    sentences = by["sentence"].choices.view(100, 20)
    assert (sentences == sentences[:, :1]).all() and len(sentences.unique()) == 4
    assert len(by["batch"].choices.unique()) == 1
    assert all((r.assignment.weight == 1).all() and not r.losses for r in by.values())


def test_random_redraws_at_every_update_and_repeats_itself_at_evaluation() -> None:
    router, x = make_router("random"), tokens(200)
    at = [router(x, batch_context([200], training=True, update=u)).choices for u in (0, 1)]
    assert (at[0] == at[1]).double().mean().item() < 0.3
    evaluated = [router(x, batch_context([200], seed=s)).choices for s in (4, 4, 5)]
    assert torch.equal(evaluated[0], evaluated[1])
    assert not torch.equal(evaluated[0], evaluated[2])


@pytest.mark.parametrize("name", ["hash", "random"])
def test_accounting(name: str) -> None:
    config = routing_config({"name": name})
    assert strategy(name).router.experts_per_token(config) == 1
    assert strategy(name).router.router_flops_per_token(config, 512) == 0
