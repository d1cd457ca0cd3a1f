"""Dispatch with sizes that are fixed beforehand: padded, so that no number has to reach the host.

Every rank sends ``rows`` rows to each member and as many pairs as these can have. Tokens are served in their order;
what finds no place is dropped and counted. The padding's expert is one past the last: no product touches it, and it is
mixed into a row of its own, which nobody reads.
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
    """Tokens on their way, in slots that may be empty.

    Attributes:
        tokens: rows of x that are tokens; one that follows them is for padding.
    """

    sent: SentRows
    tokens: int

    def wait(self) -> Received:
        """What arrived, with a row more, to which the padding belongs."""
        rows, row, expert, weight = self.sent.wait()
        row = torch.where(expert < self.sent.level.experts_each, row, rows.shape[0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return Received(rows, row, expert, weight, padded=True)

    def combine(self, mixed: Tensor) -> Tensor:
        """Without the rows of the padding, there and here."""
        return self.sent.send_back(mixed[:-1])[: self.tokens]


def start_fixed_dispatch(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, level: DispatchLevel, rows: int, pairs_per_row: int
) -> FixedDispatch:
    """:func:`moe_train.parallel.dispatch.start_dispatch` over one level, with fixed sizes.

    Args:
        expert: [P]; negative: a pair that is not to be carried out.
        rows: rows to each member.
        pairs_per_row: experts that a token has at most on one member.
    """
    x = ensure_requires_grad(x)
    tokens = x.shape[0]
    slots = assign_slots(token, expert, tokens, level, rows, pairs_per_row)
    level.group.counters.add_dropped(slots.dropped)
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    weight = torch.cat([weight, weight.new_zeros(1)])[slots.pair]
    index = RowIndex.of_tokens(slots.token, tokens + 1)
    sizes = _equal_sizes(level.group.size, rows, rows * pairs_per_row, x.device)
    return FixedDispatch(SentRows.start(padded, index, weight, slots.ids, level, sizes), tokens)


@dataclass(frozen=True)
class Slots:
    """What stands where, for M members with R rows and R · K pairs each.

    Attributes:
        token: [M · R]; T where the slot is empty.
        pair: [M · R · K]; P where the slot is empty.
        ids: [M · R · K, 2], as in :meth:`~moe_train.parallel.dispatch.SentRows.start`.
        dropped: 0-dim, pairs that found no place.
    """

    token: Tensor
    pair: Tensor
    ids: Tensor
    dropped: Tensor


@torch.no_grad()
def assign_slots(
    token: Tensor, expert: Tensor, num_tokens: int, level: DispatchLevel, rows: int, pairs_per_row: int
) -> Slots:
    """Places for the pairs whose expert [P] is not negative, in the order of member and token [P]."""
    members, each, room = level.group.size, level.experts_each, rows * pairs_per_row
    asked = expert >= 0
    member = torch.where(asked, expert // each, members)
    by = sort_pairs(torch.where(asked, token, 0), member, max(num_tokens, 1), members + 1)
    token, expert, member = token[by.order], expert[by.order], member[by.order]
    per_member = count_ids(member, members + 1)
    number = torch.arange(token.shape[0], device=token.device) - (per_member.cumsum(0) - per_member)[member]
    fits = (member < members) & (by.row_in_member < rows) & (number < room)
    row_slot = torch.where(fits, member * rows + by.row_in_member, members * rows)
    pair_slot = torch.where(fits, member * room + number, members * room)
    row = _filled(members * room, 0, pair_slot, by.row_in_member)
    local = _filled(members * room, each, pair_slot, expert % each)
    return Slots(
        _filled(members * rows, num_tokens, row_slot, token),
        _filled(members * room, token.shape[0], pair_slot, by.order),
        torch.stack([row, local], 1).to(torch.int32),
        asked.sum() - fits.sum(),
    )


def _filled(size: int, default: int, slot: Tensor, value: Tensor) -> Tensor:
    """[size] of ``default``, with values in their slots; those for slot ``size`` are left out."""
    return value.new_full((size + 1,), default).scatter_(0, slot, value)[:-1]


def _equal_sizes(members: int, rows: int, pairs: int, device: torch.device) -> SplitSizes:
    arriving = torch.stack([torch.full((members,), n, device=device) for n in (rows, pairs)])
    return SplitSizes([rows] * members, [pairs] * members, [rows] * members, [pairs] * members, arriving)
