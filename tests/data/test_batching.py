"""Micro-batches of the world: determinism, budgets, coverage, padding."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.batching import BatchSettings, WorldBatches, split_micro_batch
from moe_train.data.length_buckets import SOURCE_SLACK, in_length_order, split_by_budget
from moe_train.errors import DataError


@dataclass(frozen=True)
class Case:
    """A data set and how to cut it."""

    source: np.ndarray
    target: np.ndarray
    sizes: list[int]
    settings: BatchSettings

    def world(self, **changes: object) -> WorldBatches:
        chosen = dataclasses.replace(self.settings, **changes)  # type: ignore[arg-type]
        return WorldBatches(self.source, self.target, self.sizes, chosen)


@st.composite
def cases(draw: st.DrawFn, temperatures: tuple[float, ...] = (1.0, 1.5, 5.0, 100.0)) -> Case:
    """Small data sets of every shape: empty directions, long sentences, budgets near a sentence's length."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
    lengths = st.lists(st.integers(1, 30), min_size=sum(sizes), max_size=sum(sizes))
    source, target = np.array(draw(lengths)), np.array(draw(lengths))
    source[0] = target[0] = 1  # something is always short enough to be kept
    chosen = BatchSettings(
        tokens_per_update=draw(st.integers(10, 400)),
        accumulation=draw(st.integers(1, 5)),
        temperature=draw(st.sampled_from(temperatures)),
        max_sentence_tokens=draw(st.integers(5, 40)),
        seed=draw(st.integers(0, 3)),
    )
    return Case(source, target, sizes, chosen)


def realistic(sizes: list[int], seed: int = 0) -> Case:
    """Lengths like those of text, target correlated with source."""
    draws = np.random.default_rng(seed)
    source = np.clip(draws.lognormal(3.0, 0.6, sum(sizes)), 2, 200).astype(int)
    target = np.clip(source * draws.normal(1.05, 0.2, sum(sizes)), 2, 200).astype(int)
    return Case(source, target, sizes, BatchSettings(tokens_per_update=4096))


def items_of_epoch(world: WorldBatches, epoch: int) -> list[int]:
    updates = range((epoch - 1) * world.updates_per_epoch, epoch * world.updates_per_epoch)
    return [int(i) for u in updates for batch in world.update(u).micro_batches for i in batch]


@settings(max_examples=100, deadline=None)
@given(case=cases(), data=st.data())
def test_an_update_reached_at_random_is_the_one_reached_in_order(case: Case, data: st.DataObject) -> None:
    world = case.world()
    in_order = [world.update(u) for u in range(3 * world.updates_per_epoch)]
    u = data.draw(st.integers(0, len(in_order) - 1))
    alone = case.world().update(u)
    assert alone.epoch == in_order[u].epoch
    assert [b.tolist() for b in alone.micro_batches] == [b.tolist() for b in in_order[u].micro_batches]


@settings(max_examples=100, deadline=None)
@given(case=cases(temperatures=(1.0,)), epoch=st.integers(1, 4))
def test_at_temperature_one_every_kept_item_comes_once_an_epoch(case: Case, epoch: int) -> None:
    longest = case.settings.longest
    kept = np.flatnonzero(np.maximum(case.source, case.target) <= longest)
    world = case.world()
    assert sorted(items_of_epoch(world, epoch)) == kept.tolist()
    assert sum(world.left_out.values()) == len(case.source) - len(kept)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_budgets_are_respected(case: Case) -> None:
    world, budget = case.world(), case.settings.budget
    for u in range(2 * world.updates_per_epoch):
        update = world.update(u)
        assert len(update.micro_batches) <= case.settings.accumulation
        assert update.epoch == 1 + u // world.updates_per_epoch
        for batch in update.micro_batches:
            if len(batch):
                assert len(batch) * case.target[batch].max() <= budget
                assert len(batch) * case.source[batch].max() <= SOURCE_SLACK * budget or len(batch) == 1
    assert all(len(world.update(u).micro_batches) >= 1 for u in range(world.updates_per_epoch))


@settings(max_examples=50, deadline=None)
@given(case=cases(), world_size=st.integers(1, 5))
def test_ranks_share_a_micro_batch_out_without_loss_or_repetition(case: Case, world_size: int) -> None:
    batch = case.world().update(0).micro_batches[0]
    shares = [split_micro_batch(batch, r, world_size) for r in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=60), budget=st.integers(1, 100))
def test_a_cut_keeps_all_items_in_order_and_lets_an_outsized_one_stand_alone(
    lengths: list[tuple[int, int]], budget: int
) -> None:
    source, target = (np.array([p[side] for p in lengths], np.int64) for side in (0, 1))
    order = in_length_order(source, target, budget)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    edges = split_by_budget(source[order], target[order], budget)
    assert edges[0] == 0 and edges[-1] == len(lengths) and (np.diff(edges) > 0).all()
    for start, end in itertools.pairwise(edges):
        assert end - start == 1 or (end - start) * target[order][start:end].max() <= budget


def test_seeds_and_epochs_shuffle_differently() -> None:
    case = realistic([3000])
    first = case.world().update(0).micro_batches[0].tolist()
    assert case.world(seed=2).update(0).micro_batches[0].tolist() != first
    world = case.world()
    assert items_of_epoch(world, 1) != items_of_epoch(world, 2)


def test_temperature_draws_each_direction_in_its_share() -> None:
    sizes, temperature = [4000, 400, 40], 5.0
    world = realistic(sizes).world(temperature=temperature)
    direction = np.repeat(np.arange(3), sizes)
    weights = np.array(sizes, float) ** (1 / temperature)
    for epoch in (1, 2, 3):
        counts = np.bincount(direction[items_of_epoch(world, epoch)], minlength=3)
        # surplus micro-batches may be left out of a sampled epoch, a few at most
        assert counts / counts.sum() == pytest.approx(weights / weights.sum(), abs=0.02)


def test_at_a_temperature_a_small_direction_repeats_evenly_and_a_large_one_is_covered_over_epochs() -> None:
    sizes = [4000, 40]
    world = realistic(sizes).world(temperature=2.0)
    share = world._items_per_epoch
    assert sum(share) == sum(sizes) and share[0] < 4000 and share[1] > 40
    stream = np.concatenate([world._take(1, epoch) for epoch in range(3)])
    counts = np.bincount(stream - 4000, minlength=40)
    assert counts.max() - counts.min() <= 1
    stream = np.concatenate([world._take(0, epoch) for epoch in range(3)])
    assert sorted(stream[:4000].tolist()) == list(range(4000))


def test_every_epoch_has_as_many_micro_batches_at_any_temperature() -> None:
    for temperature in (1.0, 2.0, 10.0):
        world = realistic([3000, 300, 30]).world(temperature=temperature, tokens_per_update=1024, accumulation=3)
        for epoch in range(5):
            assert len(world._cached_epoch(epoch).order) == world._micro_batches


def test_a_data_set_smaller_than_one_update_is_one_update() -> None:
    world = realistic([20]).world(tokens_per_update=100_000, accumulation=1)
    assert world.updates_per_epoch == 1
    for u in range(3):
        update = world.update(u)
        assert update.epoch == u + 1
        assert sorted(np.concatenate(update.micro_batches).tolist()) == list(range(20))


def test_few_micro_batches_are_dealt_evenly_to_the_updates() -> None:
    world = realistic([500]).world(tokens_per_update=8192, accumulation=4)
    numbers = [len(world.update(u).micro_batches) for u in range(world.updates_per_epoch)]
    assert sum(numbers) == world._micro_batches and max(numbers) - min(numbers) <= 1


def test_sentences_longer_than_a_micro_batch_are_left_out_and_counted_by_direction() -> None:
    source, target = np.array([5, 50, 5, 5]), np.array([5, 5, 60, 5])
    world = WorldBatches(source, target, [2, 2], BatchSettings(tokens_per_update=40), names=("en-de", "de-en"))
    assert world.left_out == {"en-de": 1, "de-en": 1}
    assert sorted(items_of_epoch(world, 1)) == [0, 3]


def test_nothing_left_to_train_on_is_said_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"no training sentence is left.*max_sentence_tokens"):
        WorldBatches(np.array([9]), np.array([9]), [1], BatchSettings(tokens_per_update=100, max_sentence_tokens=8))


def test_a_micro_batch_has_little_padding_on_both_sides() -> None:
    case = realistic([60_000])
    world = case.world(tokens_per_update=4096)
    batches = [batch for u in range(world.updates_per_epoch) for batch in world.update(u).micro_batches]
    source, target = (
        1.0 - sum(lengths[b].sum() for b in batches) / sum(lengths[b].max() * len(b) for b in batches)
        for lengths in (case.source, case.target)
    )
    assert source < 0.10 and target < 0.05, (source, target)


def test_update_100000_of_a_small_set_needs_two_plans_not_a_replay() -> None:
    world = realistic([2000]).world(temperature=3.0)
    planned: Counter[int] = Counter()
    make = world._plan_epoch

    def counted(epoch: int) -> Any:
        planned[epoch] += 1
        return make(epoch)

    world._plan_epoch = counted  # type: ignore[method-assign]
    world.update(100_000)
    assert sum(planned.values()) == 1
