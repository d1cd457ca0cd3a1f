"""Batches planned in windows: every item once, the same wherever they are asked for, as much as a whole epoch has."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.batching import BatchSettings, WorldBatches, split_micro_batch
from moe_train.data.length_buckets import SOURCE_SLACK
from moe_train.data.permutation import Permutation
from moe_train.data.windows import WindowedBatches
from moe_train.errors import DataError


@dataclass(frozen=True)
class Case:
    """A data set, how to cut it, and the size of a window."""

    source: np.ndarray
    target: np.ndarray
    sizes: list[int]
    settings: BatchSettings
    window: int

    def world(self, **changes: object) -> WindowedBatches:
        first = np.cumsum([0, *self.sizes])

        def lengths(d: int, sentences: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            own = slice(first[d], first[d + 1])
            return self.source[own][sentences], self.target[own][sentences]

        chosen = dataclasses.replace(self.settings, **changes)  # type: ignore[arg-type]
        return WindowedBatches(lengths, self.sizes, chosen, self.window)


@st.composite
def cases(draw: st.DrawFn, temperatures: tuple[float, ...] = (1.0, 1.5, 5.0)) -> Case:
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(sum))
    draws = np.random.default_rng(draw(st.integers(0, 9)))
    source, target = draws.integers(1, 30, (2, sum(sizes)))
    source[0] = target[0] = 1  # something is always short enough to be kept
    chosen = BatchSettings(
        tokens_per_update=draw(st.integers(10, 400)),
        accumulation=draw(st.integers(1, 4)),
        temperature=draw(st.sampled_from(temperatures)),
        max_sentence_tokens=draw(st.integers(5, 40)),
        seed=draw(st.integers(0, 3)),
    )
    return Case(source, target, sizes, chosen, draw(st.integers(5, 100)))


def micro_batches(world: WindowedBatches, epoch: int) -> list[list[int]]:
    updates = range((epoch - 1) * world.updates_per_epoch, epoch * world.updates_per_epoch)
    return [batch.tolist() for u in updates for batch in world.update(u).micro_batches]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_a_permutation_has_every_number_once(size: int, key: int) -> None:
    permutation = Permutation(size, key, 7)
    assert sorted(permutation(np.arange(size)).tolist()) == list(range(size))
    assert permutation(np.array([size - 1, 0])).tolist() == permutation(np.arange(size))[[-1, 0]].tolist()


def test_a_permutation_looks_random() -> None:
    """Positions and what stands there, and neighbours, are not correlated; keys give different permutations."""
    size = 200_003
    first, second = (Permutation(size, 1, key)(np.arange(size)) for key in (1, 2))
    bound = 5 / np.sqrt(size)  # five standard deviations
    for left, right in ((first, np.arange(size)), (first[1:], first[:-1]), (first, second), (first[2:], first[:-2])):
        assert abs(np.corrcoef(left, right)[0, 1]) < bound
    # The thousandths of a corpus are in a window as often as in a random sample without replacement.
    counts = np.bincount(first[:50_000] * 1000 // size, minlength=1000)
    assert abs(((counts - 50) ** 2 / 50 / 0.75).sum() - 1000) < 5 * np.sqrt(2000)


@settings(max_examples=60, deadline=None)
@given(case=cases(temperatures=(1.0,)), epoch=st.integers(1, 3))
def test_every_kept_item_comes_once_an_epoch(case: Case, epoch: int) -> None:
    kept = np.flatnonzero(np.maximum(case.source, case.target) <= case.settings.longest)
    world = case.world()
    assert sorted(itertools.chain(*micro_batches(world, epoch))) == kept.tolist()
    assert sum(world.left_out.values()) == len(case.source) - len(kept)


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data(), ranks=st.integers(1, 5))
def test_an_update_is_the_same_on_any_ranks_and_after_a_resume(case: Case, data: st.DataObject, ranks: int) -> None:
    world, budget = case.world(), case.settings.budget
    in_order = [world.update(u) for u in range(2 * world.updates_per_epoch)]
    u = data.draw(st.integers(0, len(in_order) - 1))
    alone = case.world().update(u)
    assert alone.epoch == in_order[u].epoch == 1 + u // world.updates_per_epoch
    assert [b.tolist() for b in alone.micro_batches] == [b.tolist() for b in in_order[u].micro_batches]
    assert len(alone.micro_batches) >= 1
    for batch in alone.micro_batches:
        shares = [split_micro_batch(batch, r, ranks).tolist() for r in range(ranks)]
        assert sorted(itertools.chain(*shares)) == sorted(batch.tolist())
        if len(batch):
            assert len(batch) * case.target[batch].max() <= budget
            assert len(batch) * case.source[batch].max() <= SOURCE_SLACK * budget or len(batch) == 1


@settings(max_examples=40, deadline=None)
@given(case=cases(temperatures=(1.5, 5.0)))
def test_at_a_temperature_no_item_repeats_before_its_direction_is_through(case: Case) -> None:
    world = case.world(max_sentence_tokens=40, tokens_per_update=400)
    seen = Counter(item for epoch in (1, 2, 3) for batch in micro_batches(world, epoch) for item in batch)
    bounds = np.cumsum([0, *case.sizes])
    for low, high in itertools.pairwise(bounds):
        counts = [seen[item] for item in range(low, high)]
        # An epoch's part of the sequence is shuffled as a whole, so it is even at the end of any epoch.
        assert max(counts, default=0) - min(counts, default=0) <= 1


def test_windows_cost_little_padding_and_change_with_the_epoch() -> None:
    draws = np.random.default_rng(0)
    source = np.clip(draws.lognormal(3.0, 0.6, 40_000), 2, 200).astype(int)
    target = np.clip(source * draws.normal(1.05, 0.2, 40_000), 2, 200).astype(int)
    case = Case(source, target, [40_000], BatchSettings(2048, accumulation=2), 8_000)
    windows, whole = case.world(), WorldBatches(source, target, [40_000], case.settings)
    assert windows.windows == 5
    sizes = [len(windows.update(u).micro_batches) for u in range(windows.updates_per_epoch)]
    assert max(sizes) <= 2 and windows.updates_per_epoch <= 1.15 * whole.updates_per_epoch
    # A window is a random sample of the items, so those of two epochs have as many in common as two samples.
    first, second = ([set(batch) for batch in micro_batches(windows, epoch)] for epoch in (1, 2))
    fifth = len(first) // 5
    overlap = len(set().union(*first[:fifth]) & set().union(*second[:fifth]))
    assert overlap == pytest.approx(40_000 / 25, rel=0.1)


def test_nothing_left() -> None:
    case = Case(np.array([9] * 8), np.array([9] * 8), [8], BatchSettings(100, max_sentence_tokens=8), 4)
    with pytest.raises(DataError, match="all are longer than 8 tokens"):
        case.world()
