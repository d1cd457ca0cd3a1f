"""Tokens to the ranks that hold their experts, and mixed rows back.

A token travels once to each destination that holds any of its experts, with the numbers and weights of those experts;
there its outputs are mixed in fp32 and one row comes back. So k experts on one destination cost one row each way
whatever k is (SAM's promise), and k experts anywhere never more than min(k, destinations) rows.

``all_to_all_single`` only, counts first, one host sync for all levels and chunks. Every rank runs the same collectives
in forward and in backward, whatever its share is, so an empty rank cannot make others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.flights import Flight, begin, end
from moe_train.parallel.rows import TokenRows, gather_rows, mix_rows
from moe_train.parallel.sizes import ChunkSizes, Level, Splits, agree, sort_pairs

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int] | None], Tensor]
"""(x [R, d], row [P], expert [P], weight [P], pairs of each expert) → Σ weight · f_expert(x_row) [R, d] in at least
fp32. Experts count from 0 among those that the destination holds. Where the pairs of each expert are not on the host
(None) an expert of their number means none at all: such a pair is padding."""
Carried = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Beside = Callable[[], Tensor]


@dataclass(frozen=True)
class Cargo:
    """What one chunk sends at one level.

    Attributes:
        x: [T, d].
        rows: which of them go, in the order of the members.
        weight: [P], in the order of the pairs.
        meta: [P, 2] int32: the pair's row, counted from its member's first, and its expert, from its member's first.
        tokens: rows of x that are tokens; one that follows them is for padding.
    """

    x: Tensor
    rows: TokenRows
    weight: Tensor
    meta: Tensor
    tokens: int


class Trip:
    """One chunk on its way: :meth:`depart`, then :meth:`carry`, then :meth:`come_back`, which other chunks may part."""

    def __init__(self, level: Level, splits: Splits, cargo: Cargo, mix: Carried) -> None:
        self.level, self.splits, self.cargo, self.mix = level, splits, cargo, mix
        self._buffers: tuple[Tensor, ...] = ()

    def depart(self) -> None:
        """Rows, weights and numbers set out."""
        s, peers = self.splits, self.level.peers
        self._meta = Flight(peers, s.send_pairs, s.receive_pairs)
        self._out = (
            Flight(peers, s.send_rows, s.receive_rows, payload=True),
            Flight(peers, s.send_pairs, s.receive_pairs),
        )
        peers.counters.add(peers.links, dispatched_rows=s.send_rows)
        received = self._meta.start(self.cargo.meta)
        self._buffers = (received, *begin(self._out, gather_rows(self.cargo.x, self.cargo.rows), self.cargo.weight))

    def carry(self) -> None:
        """They arrive, the experts work, and mixed rows set out for home."""
        s, peers = self.splits, self.level.peers
        meta, *buffers = self._buffers
        self._meta.wait()
        received, weight = end(self._out, *buffers)
        place, expert = meta.long().unbind(1)
        mixed = self.mix(received, place + s.first_rows(), expert, weight)
        self._home = (Flight(peers, s.receive_rows, s.send_rows, payload=True),)
        peers.counters.add(peers.links, returned_rows=s.receive_rows)
        self._buffers = begin(self._home, mixed.to(self.cargo.x.dtype))

    def come_back(self) -> Tensor:
        """y [T, d] in at least fp32."""
        (returned,) = end(self._home, *self._buffers)
        return mix_rows(returned, None, self.cargo.rows)[: self.cargo.tokens]


def exchange(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    levels: Sequence[Level],
    mix: Mix,
    chunks: int = 1,
    beside: Beside | None = None,
) -> Tensor:
    """y_t = Σ over pairs (t, e, w) of w · f_e(x_t), the experts divided over a group.

    Args:
        x: [T, d].
        token: [P] int64, row of x.
        expert: [P] int64, numbered over the whole group.
        weight: [P], differentiable.
        levels: one step, or two: nodes, then the ranks of a node.
        mix: what a destination does with what arrives.
        chunks: parts of the tokens that travel one after the other, while others are computed.
        beside: work that needs none of this, done while the first rows travel; its [T, d] is added.

    Returns:
        [T, d] in at least fp32; the payload travels in x's type.
    """
    x = joining(x)
    first, width = levels[0], -(-x.shape[0] // chunks) or 1
    chunk = token // width
    bins = chunk * first.peers.size + expert // first.experts_each
    pairs = sort_pairs(token, bins, x.shape[0], chunks * first.peers.size)
    sizes = agree(pairs, token, expert, x.shape[0], chunk, chunks, levels)
    rows, number = ([sum(getattr(s.levels[0], n)) for s in sizes] for n in ("send_rows", "send_pairs"))
    row_token = token.new_empty(sum(rows)).scatter_(0, pairs.row, token[pairs.order])
    parts = zip(
        x.split([max(0, min(width, x.shape[0] - c * width)) for c in range(chunks)]),
        (row_token % width).split(rows),
        weight[pairs.order].split(number),
        _meta(pairs.row_in_member, expert[pairs.order] % first.experts_each).split(number),
        sizes,
        strict=True,
    )
    trips = []
    for own, row, w, m, size in parts:
        cargo = Cargo(own, TokenRows.of_tokens(row, own.shape[0]), w, m, own.shape[0])
        trips.append(Trip(first, size.levels[0], cargo, _next(levels, size, mix)))
    return travel(trips, beside)


def joining(x: Tensor) -> Tensor:
    """x, needing a gradient: all ranks must meet in backward's collectives, whatever this one's tokens need."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def travel(trips: Sequence[Trip], beside: Beside | None) -> Tensor:
    """Each chunk's rows travel while the one before is computed, and the first one's while ``beside`` is."""
    trips[0].depart()
    aside = beside() if beside is not None else None
    for number, trip in enumerate(trips):
        if number + 1 < len(trips):
            trips[number + 1].depart()
        trip.carry()
    parts = [trip.come_back() for trip in trips]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if aside is None else y + aside


def _next(levels: Sequence[Level], size: ChunkSizes, mix: Mix) -> Carried:
    """What the first destination does: its experts' work, or another exchange with the ranks of its node."""
    if len(levels) == 1:
        return lambda x, row, expert, weight: mix(x, row, expert, weight, size.experts)
    level, splits = levels[1], size.levels[1]

    def pass_on(x: Tensor, row: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        pairs = sort_pairs(row, expert // level.experts_each, x.shape[0], level.peers.size)
        row_token = row.new_empty(sum(splits.send_rows)).scatter_(0, pairs.row, row[pairs.order])
        meta = _meta(pairs.row_in_member, expert[pairs.order] % level.experts_each)
        cargo = Cargo(x, TokenRows.of_tokens(row_token, x.shape[0]), weight[pairs.order], meta, x.shape[0])
        onward = Trip(level, splits, cargo, lambda x, row, expert, weight: mix(x, row, expert, weight, size.experts))
        return travel([onward], None)

    return pass_on


def _meta(row: Tensor, expert: Tensor) -> Tensor:
    return torch.stack([row, expert], 1).to(torch.int32)
