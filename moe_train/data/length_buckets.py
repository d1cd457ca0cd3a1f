"""Sorts sentences by length and splits them into batches by a budget of tokens, padding included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# A micro-batch has at most this many source tokens per target token of its budget, so that memory is bounded where
# sources are much longer than targets.
SOURCE_SLACK = 2

# A bucket of target lengths ends once it has this many micro-batches, or at this ratio of its longest to its shortest.
# On 60,000 sentences of documentation and 8,192 tokens, padding is 8 % of the sources and 4 % of the targets.
BUCKET_MICRO_BATCHES = 8
BUCKET_RATIO = 1.15


def in_length_order(source: NDArray[np.integer], target: NDArray[np.integer], budget: int) -> Indices:
    """An order in which neighbours have similar lengths on both sides.

    Items are divided into narrow buckets by target length; within a bucket they are sorted by source length, ascending
    in one bucket and descending in the next, so that lengths do not jump in a micro-batch across two buckets. Items of
    equal length keep their order.

    Returns:
        [N] indices.
    """
    if not len(target):
        return np.empty(0, np.int64)
    bucket = _bucket_of_length(target, budget)[target]
    ascending = np.where(bucket % 2 == 0, source, -source)
    return np.lexsort((target, ascending, bucket))


def split_by_budget(source: NDArray[np.integer], target: NDArray[np.integer], budget: int) -> Indices:
    """Splits a sorted sequence greedily into runs of ``rows · longest target ≤ budget`` and a looser bound on sources.

    An item that exceeds the budget is a run of its own.

    Returns:
        [M + 1] edges: run m is ``[edges[m], edges[m + 1])``.
    """
    count = len(target)
    edges = [0]
    while edges[-1] < count:
        start = edges[-1]
        # No run is longer than budget / its first target: a search up to there keeps the whole function linear.
        stop = min(count, start + max(1, budget // max(1, int(target[start]))))
        rows = np.arange(1, stop - start + 1)
        fits = np.maximum.accumulate(target[start:stop]) * rows <= budget
        fits &= np.maximum.accumulate(source[start:stop]) * rows <= SOURCE_SLACK * budget
        fits[0] = True
        edges.append(stop if fits.all() else start + int(np.argmin(fits)))
    return np.array(edges, np.int64)


def batch_by_length(
    items: Indices, source: NDArray[np.integer], target: NDArray[np.integer], budget: int
) -> list[Indices]:
    """Batches of items [N] of similar length within the budget."""
    order = in_length_order(source, target, budget)
    edges = split_by_budget(source[order], target[order], budget)
    return [batch for batch in np.split(items[order], edges[1:-1]) if len(batch)]


def _bucket_of_length(target: NDArray[np.integer], budget: int) -> NDArray[np.int64]:
    """Bucket of each target length 0 … max: wide enough for some micro-batches, narrow enough for little padding."""
    tokens = np.bincount(target) * np.arange(int(target.max()) + 1)
    bucket = np.zeros(len(tokens), np.int64)
    number, size, lowest = 0, 0, 0
    for length, amount in enumerate(tokens):
        if size >= BUCKET_MICRO_BATCHES * budget or length > lowest * BUCKET_RATIO + 1:
            number, size, lowest = number + 1, 0, length
        bucket[length] = number
        size += int(amount)
    return bucket
