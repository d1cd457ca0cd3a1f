"""Dispatch with fixed, padded sizes, so that no size is read by the host.

Every rank sends ``rows`` rows to each member, and the largest number of pairs that these rows can have. Slots are
filled in the order of tokens; pairs that do not fit are dropped and counted. Padding pairs have the expert id one past
the last: they are not computed, and are summed into an extra row that is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.dispatch import Received, SentRows, ensure_requires_grad
from moe_train.parallel.permute import RowIndex, count_ids
from moe_train.parallel.split_sizes import DispatchLevel, SplitSizes, sort_pairs


@dataclass(frozen=True)
class FixedDispatch:
    """Dispatch over one level with fixed sizes.

    Attributes:
        tokens: T; the row after the T tokens is the source of padding.
    """

    sent: SentRows
    tokens: int

    def wait(self) -> Received:
        """Waits for the received rows, and appends the row that padding pairs belong to."""
        rows, row, expert, weight = self.sent.wait()
        row = torch.where(expert < self.sent.level.experts_per_member, row, rows.shape[0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return Received(rows, row, expert, weight, padded=True)

    def combine(self, mixed: Tensor) -> Tensor:
        """Returns rows and sums them per token, without the padding rows."""
        return self.sent.send_back(mixed[:-1])[: self.tokens]


def start_fixed_dispatch(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, level: DispatchLevel, rows: int, pairs_per_row: int
) -> FixedDispatch:
    """:func:`moe_train.parallel.dispatch.start_dispatch` over one level, with fixed sizes.

    Args:
        expert: [P]; negative: the pair is skipped.
        rows: number of rows sent to each member.
        pairs_per_row: maximum number of experts of a token on one member.
    """
    x = ensure_requires_grad(x)
    tokens = x.shape[0]
    slots = assign_slots(token, expert, tokens, level, rows, pairs_per_row)
    level.group.counters.add_dropped(slots.dropped)
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    weight = torch.cat([weight, weight.new_zeros(1)])[slots.pair]
    index = RowIndex.of_tokens(slots.token, tokens + 1)
    members, pairs = level.group.size, rows * pairs_per_row
    received_counts = torch.stack([torch.full((members,), n, device=x.device) for n in (rows, pairs)])
    sizes = SplitSizes([rows] * members, [pairs] * members, [rows] * members, [pairs] * members, received_counts)
    return FixedDispatch(SentRows.start(padded, index, weight, slots.ids, level, sizes), tokens)


@dataclass(frozen=True)
class Slots:
    """Content of the slots of M members with R rows and R · K pairs each.

    Attributes:
        token: [M · R]; T if the slot is empty.
        pair: [M · R · K]; P if the slot is empty.
        ids: [M · R · K, 2], as in :meth:`~moe_train.parallel.dispatch.SentRows.start`.
        dropped: 0-dim, number of pairs that did not fit.
    """

    token: Tensor
    pair: Tensor
    ids: Tensor
    dropped: Tensor


@torch.no_grad()
def assign_slots(
    token: Tensor, expert: Tensor, num_tokens: int, level: DispatchLevel, rows: int, pairs_per_row: int
) -> Slots:
    """Assigns slots to the pairs whose expert [P] is not negative, ordered by member and token [P]."""
    members, each, pairs_per_member = level.group.size, level.experts_per_member, rows * pairs_per_row
    valid = expert >= 0
    member = torch.where(valid, expert // each, members)
    sorted_pairs = sort_pairs(torch.where(valid, token, 0), member, max(num_tokens, 1), members + 1)
    token, expert, member = token[sorted_pairs.order], expert[sorted_pairs.order], member[sorted_pairs.order]
    per_member = count_ids(member, members + 1)
    number = torch.arange(token.shape[0], device=token.device) - (per_member.cumsum(0) - per_member)[member]
    fits = (member < members) & (sorted_pairs.row_in_member < rows) & (number < pairs_per_member)
    row_slot = torch.where(fits, member * rows + sorted_pairs.row_in_member, members * rows)
    pair_slot = torch.where(fits, member * pairs_per_member + number, members * pairs_per_member)
    row = _scatter(members * pairs_per_member, 0, pair_slot, sorted_pairs.row_in_member)
    local = _scatter(members * pairs_per_member, each, pair_slot, expert % each)
    return Slots(
        _scatter(members * rows, num_tokens, row_slot, token),
        _scatter(members * pairs_per_member, token.shape[0], pair_slot, sorted_pairs.order),
        torch.stack([row, local], 1).to(torch.int32),
        valid.sum() - fits.sum(),
    )


def _scatter(size: int, default: int, slot: Tensor, value: Tensor) -> Tensor:
    """[size] filled with ``default``, then ``value`` written at ``slot``; values for slot ``size`` are discarded."""
    return value.new_full((size + 1,), default).scatter_(0, slot, value)[:-1]
