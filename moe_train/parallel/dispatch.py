"""Dispatch of tokens to the ranks that hold their experts, and combine of the outputs.

A token is sent once to each destination that holds any of its experts, with the ids and weights of those experts. The
destination sums its weighted outputs in fp32 and returns one row. So k experts on one destination cost one row each
way for any k (as SAM needs), and k experts anywhere cost at most min(k, destinations) rows.

    dispatch = start_dispatch(x, token, expert, weight, levels)    # rows are sent; other work may overlap here
    received = dispatch.wait()
    mixed = …                                                      # [R, d]: local experts applied to received.rows
    y = dispatch.combine(mixed)

Only ``all_to_all_single`` is used; sizes are exchanged first, with one host sync for all levels. Every rank runs the
same collectives in forward and backward, so a rank without tokens cannot block the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_train.parallel.all_to_all import AllToAll, DispatchAllToAlls, return_rows, start_all_to_alls, wait_all_to_alls
from moe_train.parallel.permute import RowIndex, permute_rows, unpermute_rows
from moe_train.parallel.split_sizes import DispatchLevel, SortedPairs, SplitSizes, exchange_split_sizes, sort_pairs


@dataclass(frozen=True)
class Received:
    """Input of the local experts.

    Attributes:
        rows: [R, d].
        row: [P] int64, row of each pair.
        expert: [P] int64, local expert id; with ``padded``, the number of local experts marks a padding pair.
        weight: [P], differentiable.
        counts: number of pairs of each local expert, if known on the host.
        padded: whether there may be padding pairs, which belong to the last row and must not be computed.
        load, per_token: as in :class:`~moe_train.routing.types.Assignment`, for local experts and rows.
    """

    rows: Tensor
    row: Tensor
    expert: Tensor
    weight: Tensor
    counts: Sequence[int] | None = None
    padded: bool = False
    load: Tensor | None = None
    per_token: int = 0


class Dispatch(Protocol):
    """A dispatch in progress. Each method is called once, in this order."""

    def wait(self) -> Received:
        """Waits for the rows and pairs of the local experts."""

    def combine(self, mixed: Tensor) -> Tensor:
        """mixed [R, d], Σ weight · f_expert(row) of each received row → y [T, d] in at least fp32."""


@dataclass(frozen=True)
class LocalDispatch:
    """Dispatch without communication: all experts are local."""

    received: Received

    def wait(self) -> Received:
        """Returns the tokens."""
        return self.received

    def combine(self, mixed: Tensor) -> Tensor:
        """Returns ``mixed``: each row is a token."""
        return mixed


@dataclass
class RankDispatch:
    """Dispatch over one level (ranks) or two (nodes, then the ranks of a node).

    Attributes:
        levels, sizes: one per level.
        counts: number of pairs of each local expert.
        sent: the levels started so far.
    """

    levels: Sequence[DispatchLevel]
    sizes: Sequence[SplitSizes]
    counts: Sequence[int]
    sent: list[SentRows] = field(default_factory=list)

    def wait(self) -> Received:
        """Waits for the first level; if there is a second, sends the received rows over it and waits again."""
        rows, row, expert, weight = self.sent[0].wait()
        for level, sizes in zip(self.levels[1:], self.sizes[1:], strict=True):
            pairs = sort_pairs(row, expert // level.experts_per_member, rows.shape[0], level.group.size)
            self.sent.append(send_pairs(rows, row, expert, weight, pairs, level, sizes))
            rows, row, expert, weight = self.sent[-1].wait()
        return Received(rows, row, expert, weight, self.counts)

    def combine(self, mixed: Tensor) -> Tensor:
        """Returns rows level by level in reverse; with two levels, rows are summed on the node first."""
        for sent in reversed(self.sent):
            mixed = sent.send_back(mixed)
        return mixed


def start_dispatch(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    levels: Sequence[DispatchLevel],
    load: Tensor | None = None,
) -> RankDispatch:
    """Exchanges the sizes and starts sending tokens to their experts.

    Args:
        x: [T, d]; rows are sent in its type.
        token: [P] int64, row of x.
        expert: [P] int64, global id.
        weight: [P], differentiable.
        levels: one (ranks), or two (nodes, then the ranks of a node).
        load: [E] int64, pairs of each expert, if they have been counted.
    """
    x = ensure_requires_grad(x)
    pairs = sort_pairs(token, expert // levels[0].experts_per_member, x.shape[0], levels[0].group.size)
    sizes, counts = exchange_split_sizes(pairs, token, expert, x.shape[0], levels, load)
    return RankDispatch(levels, sizes, counts, [send_pairs(x, token, expert, weight, pairs, levels[0], sizes[0])])


def ensure_requires_grad(x: Tensor) -> Tensor:
    """x with ``requires_grad``: every rank must run backward's collectives, even if its own x needs no gradient."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def send_pairs(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, pairs: SortedPairs, level: DispatchLevel, s: SplitSizes
) -> SentRows:
    """Starts one level: one row per (token, member), with the ids and weights of the token's pairs on that member."""
    row_token = token.new_empty(sum(s.send_rows)).scatter_(0, pairs.row, token[pairs.order])
    ids = torch.stack([pairs.row_in_member, expert[pairs.order] % level.experts_per_member], 1).to(torch.int32)
    return SentRows.start(x, RowIndex.of_tokens(row_token, x.shape[0]), weight[pairs.order], ids, level, s)


@dataclass(frozen=True)
class SentRows:
    """The rows sent over one level.

    Attributes:
        index: token of each row, ordered by member.
        dtype: type of the rows.
    """

    level: DispatchLevel
    sizes: SplitSizes
    index: RowIndex
    calls: DispatchAllToAlls
    buffers: tuple[Tensor, Tensor]
    dtype: torch.dtype

    @classmethod
    def start(
        cls, x: Tensor, index: RowIndex, weight: Tensor, ids: Tensor, level: DispatchLevel, s: SplitSizes
    ) -> SentRows:
        """Starts the all-to-alls.

        Args:
            x: [T, d].
            weight: [P], ordered by member.
            ids: [P, 2] int32: row and expert of the pair, both numbered from 0 within its member.
        """
        level.group.counters.add(level.group.links, dispatched_rows=s.send_rows)
        rows = AllToAll(level.group, s.send_rows, s.receive_rows, payload=True)
        pairs, gradients = (AllToAll(level.group, s.send_pairs, s.receive_pairs) for _ in range(2))
        calls = DispatchAllToAlls(rows, pairs, gradients, ids)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        buffers = start_all_to_alls(calls, permute_rows(x, index), weight)
        return cls(level, s, index, calls, buffers, x.dtype)

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The received rows [R, d], and row, expert (numbered within the member) and weight of each pair [P]."""
        rows, weight = wait_all_to_alls(self.calls, *self.buffers)
        row, expert = self.calls.ids.long().unbind(1)
        return rows, row + self.sizes.first_row_of_pairs(), expert, weight

    def send_back(self, mixed: Tensor) -> Tensor:
        """mixed [R, d], one per received row → the sum over each token's rows [T, d] in at least fp32."""
        group, s = self.level.group, self.sizes
        group.counters.add(group.links, returned_rows=s.receive_rows)
        back = AllToAll(group, s.receive_rows, s.send_rows, payload=True)
        return unpermute_rows(return_rows(back, mixed.to(self.dtype)), None, self.index)
