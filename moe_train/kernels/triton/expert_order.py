"""Sorts pairs by expert: a histogram of each block, a scan over the blocks, and a scatter. Stable and deterministic.

Loops whose end is known on the device only are while-loops: Triton's interpreter refuses ``range`` of a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 128  # pairs of a program
_BLOCKS = 64  # blocks that the scan reads at a time


class ExpertOrder(NamedTuple):
    """Attributes:
    sorted_expert: [P] int64, the ids in ascending order.
    order: [P] int64, pair at each sorted position; pairs of one expert keep their order.
    position: [P] int64, sorted position of each pair: the inverse of ``order``.
    ends: [bins] int32, one past the last position of each id.
    """

    sorted_expert: Tensor
    order: Tensor
    position: Tensor
    ends: Tensor


def sort_by_expert(expert: Tensor, bins: int) -> ExpertOrder:
    """Sorts ids [P] int64, each in 0 .. bins - 1."""
    expert = expert.contiguous()
    pairs = expert.shape[0]
    blocks, width = triton.cdiv(pairs, _PAIRS), min(max(triton.next_power_of_2(bins), 2), 32)
    counts = expert.new_empty(2, blocks, bins, dtype=torch.int32)
    bounds = expert.new_zeros(2, bins, dtype=torch.int32)
    sorted_expert, order, position = expert.new_empty(3, pairs).unbind()
    if pairs:
        _histogram[(blocks,)](expert, counts[0], pairs, bins, _PAIRS, width)
        _scan[(1,)](counts[0], counts[1], bounds[0], bounds[1], blocks, bins, _BLOCKS, width)
        _scatter[(blocks,)](expert, counts[1], bounds[0], sorted_expert, order, position, pairs, bins, _PAIRS, width)
    return ExpertOrder(sorted_expert, order, position, bounds[1])


@triton.jit(do_not_specialize=["pairs"])
def _histogram(expert, counts, pairs, BINS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    own = tl.load(expert + pair, mask=pair < pairs, other=-1).to(tl.int32)
    for first in range(0, BINS, WIDTH):
        found = first + tl.arange(0, WIDTH)
        count = tl.sum((own[:, None] == found[None, :]).to(tl.int32), 0)
        tl.store(counts + block * BINS + found, count, mask=found < BINS)


@triton.jit(do_not_specialize=["blocks"])
def _scan(counts, before, starts, ends, blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    start = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, BINS, WIDTH):
        found = first + tl.arange(0, WIDTH)
        total = tl.zeros((WIDTH,), tl.int32)
        done = 0
        while done < blocks:
            block = done + tl.arange(0, BLOCKS)
            inside = (block < blocks)[:, None] & (found < BINS)[None, :]
            at = block[:, None] * BINS + found[None, :]
            count = tl.load(counts + at, mask=inside, other=0)
            tl.store(before + at, tl.cumsum(count, 0) - count + total[None, :], mask=inside)
            total += tl.sum(count, 0)
            done += BLOCKS
        end = start + tl.cumsum(total, 0)
        tl.store(starts + found, end - total, mask=found < BINS)
        tl.store(ends + found, end, mask=found < BINS)
        start += tl.sum(total, 0)


@triton.jit(do_not_specialize=["pairs"])
def _scatter(
    expert,
    before,
    starts,
    sorted_expert,
    order,
    position,
    pairs,
    BINS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    own = tl.load(expert + pair, mask=pair < pairs, other=-1)
    place = tl.zeros((PAIRS,), tl.int32)
    for first in range(0, BINS, WIDTH):
        found = first + tl.arange(0, WIDTH)
        hit = (own.to(tl.int32)[:, None] == found[None, :]).to(tl.int32)
        base = tl.load(before + block * BINS + found, mask=found < BINS, other=0)
        base += tl.load(starts + found, mask=found < BINS, other=0)
        place += tl.sum(hit * (tl.cumsum(hit, 0) - 1 + base[None, :]), 1)
    tl.store(position + pair, place.to(tl.int64), mask=pair < pairs)
    tl.store(order + place, pair.to(tl.int64), mask=pair < pairs)
    tl.store(sorted_expert + place, own, mask=pair < pairs)
