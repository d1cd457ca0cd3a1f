"""Tokens to the ranks that hold their experts (dispatch), and mixed rows back (combine).

A token travels once to each destination that holds any of its experts, with the ids and weights of those experts;
there its outputs are mixed in fp32 and one row comes back. So k experts on one destination cost one row each way
whatever k is (SAM's promise), and k experts anywhere never more than min(k, destinations) rows.

    dispatch = start_dispatch(x, token, expert, weight, levels)    # rows are sent; other work may overlap here
    received = dispatch.wait()
    mixed = …                                                      # [R, d]: the experts held here, on received.rows
    y = dispatch.combine(mixed)

``all_to_all_single`` only, sizes first, one host sync for all levels. Every rank runs the same collectives in forward
and in backward, whatever its share is, so an empty rank cannot make others wait.
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
    """What the experts held on this rank have to compute.

    Attributes:
        rows: [R, d].
        row: [P] int64, the row of each pair.
        expert: [P] int64, counted from the first expert held here; with ``padded`` also one past the last: no expert.
        weight: [P], differentiable.
        counts: pairs of each expert held here, where the host knows them.
        padded: whether some pairs may be padding, which must not be computed and belongs to the last row.
    """

    rows: Tensor
    row: Tensor
    expert: Tensor
    weight: Tensor
    counts: Sequence[int] | None = None
    padded: bool = False


class Dispatch(Protocol):
    """Tokens on their way to the experts of a layer. Each method is called once, in this order."""

    def wait(self) -> Received:
        """What arrived for the experts held here."""

    def combine(self, mixed: Tensor) -> Tensor:
        """mixed [R, d], for each row received Σ weight · f_expert(row) → y [T, d] in at least fp32."""


@dataclass(frozen=True)
class LocalDispatch:
    """All experts are held here: nothing is sent."""

    received: Received

    def wait(self) -> Received:
        """The tokens themselves."""
        return self.received

    def combine(self, mixed: Tensor) -> Tensor:
        """A row is a token."""
        return mixed


@dataclass
class RankDispatch:
    """Tokens on their way over one level, or two: nodes, then the ranks of a node.

    Attributes:
        levels, sizes: of each level.
        counts: pairs of each expert held here.
        sent: the levels that were sent so far.
    """

    levels: Sequence[DispatchLevel]
    sizes: Sequence[SplitSizes]
    counts: Sequence[int]
    sent: list[SentRows] = field(default_factory=list)

    def wait(self) -> Received:
        """Waits for the first level, and sends what arrived over the second one, where there are two."""
        rows, row, expert, weight = self.sent[0].wait()
        for level, sizes in zip(self.levels[1:], self.sizes[1:], strict=True):
            pairs = sort_pairs(row, expert // level.experts_each, rows.shape[0], level.group.size)
            self.sent.append(send_pairs(rows, row, expert, weight, pairs, level, sizes))
            rows, row, expert, weight = self.sent[-1].wait()
        return Received(rows, row, expert, weight, self.counts)

    def combine(self, mixed: Tensor) -> Tensor:
        """Back the same way; a node's rows are summed there before one goes back to another node."""
        for sent in reversed(self.sent):
            mixed = sent.send_back(mixed)
        return mixed


def start_dispatch(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, levels: Sequence[DispatchLevel]
) -> RankDispatch:
    """Starts to send tokens to their experts, which are divided over a group.

    Args:
        x: [T, d]; rows travel in its type.
        token: [P] int64, row of x.
        expert: [P] int64, numbered over the whole group.
        weight: [P], differentiable.
        levels: one, or two: nodes, then the ranks of a node.
    """
    x = ensure_requires_grad(x)
    pairs = sort_pairs(token, expert // levels[0].experts_each, x.shape[0], levels[0].group.size)
    sizes, counts = exchange_split_sizes(pairs, token, expert, x.shape[0], levels)
    return RankDispatch(levels, sizes, counts, [send_pairs(x, token, expert, weight, pairs, levels[0], sizes[0])])


def ensure_requires_grad(x: Tensor) -> Tensor:
    """x, needing a gradient: all ranks must meet in backward's collectives, whatever this one's tokens need."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x


def send_pairs(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, pairs: SortedPairs, level: DispatchLevel, s: SplitSizes
) -> SentRows:
    """Starts one level: one row for each token and member, the ids and weights of all its pairs there."""
    row_token = token.new_empty(sum(s.send_rows)).scatter_(0, pairs.row, token[pairs.order])
    ids = torch.stack([pairs.row_in_member, expert[pairs.order] % level.experts_each], 1).to(torch.int32)
    return SentRows.start(x, RowIndex.of_tokens(row_token, x.shape[0]), weight[pairs.order], ids, level, s)


@dataclass(frozen=True)
class SentRows:
    """The rows of one level on their way.

    Attributes:
        index: which tokens they are, in the order of the members.
        dtype: the type that they travel in.
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
            weight: [P], in the order of the members.
            ids: [P, 2] int32: the pair's row and its expert, both counted from its member's first.
        """
        level.group.counters.add(level.group.links, dispatched_rows=s.send_rows)
        rows = AllToAll(level.group, s.send_rows, s.receive_rows, payload=True)
        pairs, gradients = (AllToAll(level.group, s.send_pairs, s.receive_pairs) for _ in range(2))
        calls = DispatchAllToAlls(rows, pairs, gradients, ids)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        buffers = start_all_to_alls(calls, permute_rows(x, index), weight)
        return cls(level, s, index, calls, buffers, x.dtype)

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows [R, d] that arrived; of their pairs [P] the row, the expert from the member's first, the weight."""
        rows, weight = wait_all_to_alls(self.calls, *self.buffers)
        row, expert = self.calls.ids.long().unbind(1)
        return rows, row + self.sizes.first_row_of_pairs(), expert, weight

    def send_back(self, mixed: Tensor) -> Tensor:
        """mixed [R, d], one for each row that arrived → the sum over each token's rows [T, d] in at least fp32."""
        group, s = self.level.group, self.sizes
        group.counters.add(group.links, returned_rows=s.receive_rows)
        back = AllToAll(group, s.receive_rows, s.send_rows, payload=True)
        return unpermute_rows(return_rows(back, mixed.to(self.dtype)), None, self.index)
