"""Sorting sentences by length and cutting them into rectangles under a budget of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# A micro-batch holds at most this many source tokens per target token of its budget, so that memory is bounded where
# sources are much longer than targets.
SOURCE_SLACK = 2

# A band of target lengths ends once it holds this many micro-batches, or at this ratio of its longest to its shortest.
# On 60,000 sentences of documentation and 8,192 tokens they leave 8 % of padding in sources and 4 % in targets.
BAND_MICRO_BATCHES = 8
BAND_WIDTH = 1.15


def in_length_order(source: NDArray[np.int64], target: NDArray[np.int64], budget: int) -> Indices:
    """An order in which neighbours are of like length on both sides.

    Targets are put into narrow bands; inside a band the items are sorted by source length, up in one band and down in
    the next, so that a micro-batch that lies across two bands sees no jump. Equal lengths keep their given order.

    Returns:
        [N] indices.
    """
    if not len(target):
        return np.empty(0, np.int64)
    band = _bands(target, budget)[target]
    rising = np.where(band % 2 == 0, source, -source)
    return np.lexsort((target, rising, band))


def cut(source: NDArray[np.int64], target: NDArray[np.int64], budget: int) -> Indices:
    """Cuts a sorted sequence greedily into runs of ``rows · longest target ≤ budget`` and a looser bound on the source.

    A single item that outgrows the budget stands alone.

    Returns:
        [M + 1] edges: run m is ``[edges[m], edges[m + 1])``.
    """
    count = len(target)
    edges = [0]
    while edges[-1] < count:
        start = edges[-1]
        # No run can be longer than budget / its first target; looking no further keeps the whole cut linear.
        stop = min(count, start + max(1, budget // max(1, int(target[start]))))
        rows = np.arange(1, stop - start + 1)
        fits = np.maximum.accumulate(target[start:stop]) * rows <= budget
        fits &= np.maximum.accumulate(source[start:stop]) * rows <= SOURCE_SLACK * budget
        fits[0] = True
        edges.append(stop if fits.all() else start + int(np.argmin(fits)))
    return np.array(edges, np.int64)


def cut_by_length(items: Indices, source: NDArray[np.int64], target: NDArray[np.int64], budget: int) -> list[Indices]:
    """Items [N] with their lengths, put in length order and cut: batches of like length under the budget."""
    order = in_length_order(source, target, budget)
    edges = cut(source[order], target[order], budget)
    return [batch for batch in np.split(items[order], edges[1:-1]) if len(batch)]


def _bands(target: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The band of each target length: wide enough for some micro-batches, narrow enough for little padding."""
    tokens = np.bincount(target) * np.arange(int(target.max()) + 1)
    band = np.zeros(len(tokens), np.int64)
    number, held, lowest = 0, 0, 0
    for length, amount in enumerate(tokens):
        if held >= BAND_MICRO_BATCHES * budget or length > lowest * BAND_WIDTH + 1:
            number, held, lowest = number + 1, 0, length
        band[length] = number
        held += int(amount)
    return band
