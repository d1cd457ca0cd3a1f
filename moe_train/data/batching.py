"""Micro-batches of all ranks together: determined by (seed, update), independent of the number of ranks.

An *item* is a sentence in a direction. Items are numbered direction after direction. An epoch takes its share of every
direction, sorts by length so that micro-batches contain little padding, splits by a budget of tokens, and shuffles the
micro-batches. Properties that callers may rely on:

- Items that are too long are left out; N items are kept, n_d of them in direction d.
- At temperature T = 1 every kept item occurs exactly once per epoch. At another T direction d contributes about
  ``N · n_d^(1/T) / Σ n^(1/T)`` items (Arivazhagan et al. 2019), taken from an endless sequence of permutations of the
  direction, so that no item repeats before all others have occurred. The number is exact unless micro-batches are left
  out so that the epoch has as many as the first one.
- An update never mixes epochs. The micro-batches of an epoch are distributed evenly over its updates, so some updates
  have fewer than ``accumulation``; the counts are the same for every rank.
- Every epoch has the same number of updates, so any update is found by planning one epoch, without replay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_train.data.length_buckets import in_length_order, split_by_budget
from moe_train.errors import DataError

Indices = NDArray[np.int64]

# 1: an epoch is planned as a whole. 2: a corpus of more items than training.shuffle_window is planned in windows.
PLAN_VERSION = 2

# Streams of random numbers: two uses of one (seed, epoch) never share numbers.
_PERMUTATION, _TIES, _ORDER, _SURPLUS = range(4)


@dataclass(frozen=True)
class BatchSettings:
    """How an epoch is divided into updates and micro-batches.

    Attributes:
        tokens_per_update: target tokens (padding included) of one update, over all ranks.
        accumulation: micro-batches of an update.
        temperature: directions are sampled in proportion to size^(1/temperature).
        max_sentence_tokens: items that are longer on either side are left out.
        seed: the run's seed.
    """

    tokens_per_update: int
    accumulation: int = 1
    temperature: float = 1.0
    max_sentence_tokens: int = 256
    seed: int = 1

    @property
    def budget(self) -> int:
        """Target tokens of one micro-batch, padding included."""
        return max(1, self.tokens_per_update // self.accumulation)

    @property
    def longest(self) -> int:
        """Length of the longest item that is kept; a longer one would not fit into a micro-batch."""
        return min(self.max_sentence_tokens, self.budget)


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer update, over all ranks.

    Attributes:
        epoch: counted from 1.
        micro_batches: items of each micro-batch, sorted so that neighbours have similar lengths.
    """

    epoch: int
    micro_batches: tuple[Indices, ...]


@dataclass(frozen=True)
class _Epoch:
    """A planned epoch: micro-batch m is ``items[starts[m]:ends[m]]``; ``order`` is the shuffled order of the m."""

    items: Indices
    starts: Indices
    ends: Indices
    order: Indices


class Batches(Protocol):
    """The micro-batches of every update: of :class:`WorldBatches`, or of windows of a large corpus."""

    settings: BatchSettings
    left_out: dict[str, int]
    updates_per_epoch: int

    def update(self, u: int) -> Update:
        """The update after ``u`` finished ones (0: the first)."""


class WorldBatches:
    """The micro-batches of every update, with random access.

    Args:
        source_lengths, target_lengths: [N] tokens of each item, tags and end included.
        direction_sizes: items of each direction, in the order of the items; they sum to N.
        names: of the directions, for messages.

    Raises:
        DataError: no item is left to train on.
    """

    def __init__(
        self,
        source_lengths: NDArray[np.integer],
        target_lengths: NDArray[np.integer],
        direction_sizes: Sequence[int],
        settings: BatchSettings,
        names: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self._source = np.ascontiguousarray(source_lengths, dtype=np.int64)
        self._target = np.ascontiguousarray(target_lengths, dtype=np.int64)
        if len(self._source) != len(self._target) or sum(direction_sizes) != len(self._target):
            raise ValueError("lengths and direction sizes do not agree")
        kept = np.maximum(self._source, self._target) <= settings.longest
        bounds = np.cumsum([0, *direction_sizes])
        self._pools = [lo + np.flatnonzero(kept[lo:hi]) for lo, hi in itertools.pairwise(bounds)]
        self.left_out = {
            names[d] if names else str(d): int(size - len(pool))
            for d, (size, pool) in enumerate(zip(direction_sizes, self._pools, strict=True))
        }
        if not any(len(pool) for pool in self._pools):
            raise nothing_left(len(kept), settings.longest)
        self._items_per_epoch = items_per_epoch([len(pool) for pool in self._pools], settings.temperature)
        self._cache: dict[int, _Epoch] = {}
        self._micro_batches = 0  # the first epoch is not yet planned, and its number is not adjusted
        self._micro_batches = len(self._cached_epoch(0).order)
        self.updates_per_epoch = math.ceil(self._micro_batches / settings.accumulation)

    def update(self, u: int) -> Update:
        """The update after ``u`` finished ones (0: the first)."""
        epoch, within = divmod(u, self.updates_per_epoch)
        plan = self._cached_epoch(epoch)
        first, last = (self._micro_batches * n // self.updates_per_epoch for n in (within, within + 1))
        batches = tuple(plan.items[plan.starts[m] : plan.ends[m]] for m in plan.order[first:last])
        return Update(epoch + 1, batches)

    def _cached_epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._cache:
            planned = self._plan_epoch(epoch)
            # Two epochs are enough for a loader that prefetches over the end of an epoch.
            while len(self._cache) > 1:
                del self._cache[min(self._cache, key=lambda e: -abs(e - epoch))]
            self._cache[epoch] = planned
        return self._cache[epoch]

    def _plan_epoch(self, epoch: int) -> _Epoch:
        budget = self.settings.budget
        items = np.concatenate([self._take(d, epoch) for d in range(len(self._pools))])
        items = items[self._generator(_TIES, epoch).permutation(len(items))]
        items = items[in_length_order(self._source[items], self._target[items], budget)]
        edges = split_by_budget(self._source[items], self._target[items], budget)
        starts, ends = edges[:-1], edges[1:]
        if self._micro_batches:
            starts, ends = self._match_first_epoch(starts, ends, epoch)
        return _Epoch(items, starts, ends, self._generator(_ORDER, epoch).permutation(len(starts)))

    def _take(self, direction: int, epoch: int) -> Indices:
        """This epoch's part of the direction's endless sequence of permutations."""
        pool, share = self._pools[direction], self._items_per_epoch[direction]
        taken: list[Indices] = []
        position, end = epoch * share, (epoch + 1) * share
        while position < end:
            turn, offset = divmod(position, len(pool))
            stop = min(len(pool), offset + end - position)
            shuffled = pool[self._generator(_PERMUTATION, direction, turn).permutation(len(pool))]
            taken.append(shuffled[offset:stop])
            position += stop - offset
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _match_first_epoch(self, starts: Indices, ends: Indices, epoch: int) -> tuple[Indices, Indices]:
        """Gives the epoch the same number of micro-batches as the first one.

        At temperature 1 the sorted lengths, and so the number of micro-batches, are the same in every epoch. Otherwise
        an epoch is a sample: the micro-batches with most rows are halved, or surplus ones are left out.
        """
        wanted = self._micro_batches
        if len(starts) > wanted:
            keep = np.sort(self._generator(_SURPLUS, epoch).permutation(len(starts))[:wanted])
            return starts[keep], ends[keep]
        return halve_largest(starts, ends, wanted)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.settings.seed, *key])))


def halve_largest(starts: Indices, ends: Indices, wanted: int) -> tuple[Indices, Indices]:
    """At least ``wanted`` micro-batches: those with most rows are halved; where all have one row, empty ones follow."""
    while len(starts) < wanted:
        rows = ends - starts
        largest = np.argsort(-rows, kind="stable")[: wanted - len(starts)]
        largest = largest[rows[largest] > 1]
        if not len(largest):  # every micro-batch is a single row
            empty = np.full(wanted - len(starts), ends[-1])
            return np.concatenate([starts, empty]), np.concatenate([ends, empty])
        middle = starts[largest] + rows[largest] // 2
        starts, ends = np.sort(np.concatenate([starts, middle])), np.sort(np.concatenate([ends, middle]))
    return starts, ends


def nothing_left(items: int, longest: int) -> DataError:
    """The error of a corpus all of whose items are too long."""
    return DataError(
        f"no training sentence is left: of {items}, all are longer than {longest} tokens",
        remedy="raise training.max_sentence_tokens or training.tokens_per_update, or prepare more data",
    )


def split_micro_batch(indices: Indices, rank: int, world: int) -> Indices:
    """``rank``'s rows of a micro-batch: every ``world``-th row, so each rank gets similar lengths."""
    return indices[rank::world]


def items_per_epoch(sizes: Sequence[int], temperature: float) -> list[int]:
    """Items of each direction per epoch; rounded by the largest-remainder method, they sum to the number of items."""
    total = sum(sizes)
    if temperature == 1.0:
        return list(sizes)
    weights = np.array([float(n) ** (1.0 / temperature) if n else 0.0 for n in sizes])
    exact = total * weights / weights.sum()
    shares = np.floor(exact).astype(np.int64)
    for d in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[d] += 1
    return [int(n) for n in shares]
