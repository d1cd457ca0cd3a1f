"""Micro-batches of a large corpus, planned window by window instead of epoch by epoch.

A window is a random part of the epoch: a permutation that is computed, not stored, gives the items at its positions.
The window is sorted by length, split by the budget of tokens and shuffled like a small corpus. All windows have the
same number of items, apart from one, and the same number of updates, so any update is found by planning one window.
The rest is as in :mod:`moe_train.data.batching`: the shares of directions, items once per epoch at temperature 1, and
micro-batches that depend on (seed, update) only.

Windows differ in their number of micro-batches by little. Where a window has fewer than updates, its largest ones are
halved; where it has more than ``accumulation`` for each update, some updates have one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_train.data.batching import BatchSettings, Indices, Update, halve_largest, items_per_epoch, nothing_left
from moe_train.data.length_buckets import in_length_order, split_by_budget
from moe_train.data.permutation import Permutation

Lengths = NDArray[np.int32]

#: (number of a direction, its sentences) → tokens of the sources and of the targets, tags and end included.
LengthsOf = Callable[[int, "slice | Indices"], tuple[Indices, Indices]]

# Streams of random numbers, apart from those of moe_train/data/batching.py.
_EPOCH, _DIRECTION, _ORDER = range(16, 19)
_TOGETHER = 1 << 17  # items handled together, so that a window needs little memory besides its own

# Windows of n items differ in their micro-batches by about 0.6 / sqrt(n) of them (standard deviation, lengths of text);
# a window has updates for the first one's micro-batches and this many / sqrt(n) more.
_MARGIN = 4


@dataclass(frozen=True)
class _Window:
    """Micro-batch m is ``items[starts[m]:ends[m]]``; ``order`` is the shuffled order of the m."""

    items: Indices
    starts: Indices
    ends: Indices
    order: Indices


class WindowedBatches:
    """The micro-batches of every update, with random access, in the memory of two windows.

    Args:
        lengths: of any sentences of a direction; only those of a window are asked for at once.
        direction_sizes: items of each direction, in the order of the items.
        window: most items of a window.
        names: of the directions, for messages.

    Raises:
        DataError: no item is left to train on.
    """

    def __init__(
        self,
        lengths: LengthsOf,
        direction_sizes: Sequence[int],
        settings: BatchSettings,
        window: int,
        names: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self._lengths, self._sizes = lengths, list(direction_sizes)
        self._first = np.cumsum([0, *self._sizes])
        kept = [self._count_kept(d) for d in range(len(self._sizes))]
        self.left_out = {
            names[d] if names else str(d): size - n for d, (size, n) in enumerate(zip(self._sizes, kept, strict=True))
        }
        if not any(kept):
            raise nothing_left(sum(self._sizes), settings.longest)
        # Positions of an epoch include items that are too long, which a window leaves out when it is planned.
        shares = zip(items_per_epoch(kept, settings.temperature), self._sizes, kept, strict=True)
        self._shares = [round(share * size / n) if n else 0 for share, size, n in shares]
        self._ends = np.cumsum(self._shares)
        self.windows = max(1, math.ceil(int(self._ends[-1]) / window))
        items, starts, _ = self._split(self._items(0))
        expected = len(starts) * (1 + _MARGIN / math.sqrt(max(1, len(items))))
        self._updates_per_window = max(1, math.ceil(expected / settings.accumulation))
        self.updates_per_epoch = self.windows * self._updates_per_window
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows")
        self._planned: dict[int, Future[_Window]] = {}

    def update(self, u: int) -> Update:
        """The update after ``u`` finished ones (0: the first)."""
        number, within = divmod(u, self._updates_per_window)
        wanted = (number, number + 1)  # the next window is planned while the updates of this one are computed
        self._planned = {n: self._planned.get(n) or self._pool.submit(self._plan, n) for n in wanted}
        plan = self._planned[number].result()
        first, last = (len(plan.order) * n // self._updates_per_window for n in (within, within + 1))
        batches = tuple(plan.items[plan.starts[m] : plan.ends[m]] for m in plan.order[first:last])
        return Update(number // self.windows + 1, batches)

    def _plan(self, number: int) -> _Window:
        """The window ``number``, counted from the first epoch's first one."""
        items, starts, ends = self._split(self._items(number))
        starts, ends = halve_largest(starts, ends, self._updates_per_window)
        key = np.random.SeedSequence([self.settings.seed, _ORDER, number])
        order = np.random.Generator(np.random.Philox(key)).permutation(len(starts))
        return _Window(items, starts, ends, order)

    def _items(self, number: int) -> tuple[Indices, Lengths, Lengths]:
        """Items of a window in random order, with the lengths of their sources and targets; without too long ones."""
        total = int(self._ends[-1])
        epoch, window = divmod(number, self.windows)
        first, last = (total * n // self.windows for n in (window, window + 1))
        permutation = Permutation(total, self.settings.seed, _EPOCH, epoch)
        items, lengths = np.empty(last - first, np.int64), np.empty((2, last - first), np.int32)
        for start in range(first, last, _TOGETHER):
            stop = min(start + _TOGETHER, last)
            part = slice(start - first, stop - first)
            items[part], lengths[:, part] = self._drawn(permutation(np.arange(start, stop)), epoch)
        kept = lengths.max(axis=0) <= self.settings.longest
        return items[kept], lengths[0, kept], lengths[1, kept]

    def _drawn(self, places: Indices, epoch: int) -> tuple[Indices, Indices]:
        """The items at ``places`` [N] of the epoch, one direction behind the other, and their lengths [2, N]."""
        directions = np.searchsorted(self._ends, places, side="right")
        items, lengths = np.zeros(len(places), np.int64), np.zeros((2, len(places)), np.int64)
        for d in np.unique(directions).tolist():
            here = np.flatnonzero(directions == d)
            # The direction's items come from an endless sequence of its permutations, as at any temperature.
            drawn = places[here] - (self._ends[d] - self._shares[d]) + epoch * self._shares[d]
            turn, place = np.divmod(drawn, self._sizes[d])
            sentences = np.empty(len(here), np.int64)
            for t in np.unique(turn).tolist():
                sentences[turn == t] = Permutation(self._sizes[d], self.settings.seed, _DIRECTION, d, t)(
                    place[turn == t]
                )
            items[here] = self._first[d] + sentences
            lengths[:, here] = self._lengths(d, sentences)
        return items, lengths

    def _split(self, window: tuple[Indices, Lengths, Lengths]) -> tuple[Indices, Indices, Indices]:
        """The items in the order of their lengths, and where each micro-batch starts and ends."""
        items, source, target = window
        if not len(items):  # nothing but sentences that are too long: one empty micro-batch
            return items, np.zeros(1, np.int64), np.zeros(1, np.int64)
        order = in_length_order(source, target, self.settings.budget)
        edges = split_by_budget(source[order], target[order], self.settings.budget)
        return items[order], edges[:-1], edges[1:]

    def _count_kept(self, direction: int) -> int:
        kept = 0
        for start in range(0, self._sizes[direction], _TOGETHER):
            lengths = self._lengths(direction, slice(start, min(start + _TOGETHER, self._sizes[direction])))
            kept += int((np.maximum(*lengths) <= self.settings.longest).sum())
        return kept
