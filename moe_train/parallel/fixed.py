"""The exchange with sizes that are agreed beforehand: padded, so that no number has to reach the host.

Every rank sends ``rows`` rows to each member and as many pairs as these can have. Tokens are served in their order;
what finds no place is dropped and counted. The padding's expert is one past the last: no product touches it, and it is
mixed into a row of its own, which nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.exchange import Beside, Cargo, Carried, Mix, Trip, joining, travel
from moe_train.parallel.rows import TokenRows, count_ids
from moe_train.parallel.sizes import Level, Splits, sort_pairs


def exchange_fixed(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    level: Level,
    mix: Mix,
    rows: int,
    pairs_per_row: int,
    chunks: int = 1,
    beside: Beside | None = None,
) -> Tensor:
    """:func:`moe_train.parallel.exchange.exchange` in one step, with fixed sizes.

    Args:
        expert: [P]; negative: a pair that is not to be carried out.
        rows: rows to each member, over all chunks together.
        pairs_per_row: experts that a token has at most on one member.
    """
    x = joining(x)
    width, each = -(-x.shape[0] // chunks) or 1, -(-rows // chunks)
    nothing = x.new_zeros(1, x.shape[1])
    trips = []
    for c, own in enumerate(x.split([max(0, min(width, x.shape[0] - c * width)) for c in range(chunks)])):
        here = torch.where(token // width == c, expert, -1)
        slots = give_slots(token - c * width, here, own.shape[0], level, each, pairs_per_row)
        level.peers.counters.add_dropped(slots.dropped)
        padded = torch.cat([weight, weight.new_zeros(1)])[slots.pair]
        rows_of = TokenRows.of_tokens(slots.token, own.shape[0] + 1)
        cargo = Cargo(torch.cat([own, nothing]), rows_of, padded, slots.meta, own.shape[0])
        trips.append(Trip(level, _equal(level, each, pairs_per_row, x.device), cargo, _without_padding(level, mix)))
    return travel(trips, beside)


@dataclass(frozen=True)
class Slots:
    """What stands where, for M members with R rows and R · K pairs each.

    Attributes:
        token: [M · R]; T where nobody stands.
        pair: [M · R · K]; P where none stands.
        meta: [M · R · K, 2], as in :class:`~moe_train.parallel.exchange.Cargo`.
        dropped: 0-dim, pairs that found no place.
    """

    token: Tensor
    pair: Tensor
    meta: Tensor
    dropped: Tensor


@torch.no_grad()
def give_slots(token: Tensor, expert: Tensor, num_tokens: int, level: Level, rows: int, pairs_per_row: int) -> Slots:
    """Places for the pairs whose expert [P] is not negative, in the order of member and token [P]."""
    members, each, room = level.peers.size, level.experts_each, rows * pairs_per_row
    asked = expert >= 0
    member = torch.where(asked, expert // each, members)
    by = sort_pairs(torch.where(asked, token, 0), member, max(num_tokens, 1), members + 1)
    token, expert, member = token[by.order], expert[by.order], member[by.order]
    per_member = count_ids(member, members + 1)
    number = torch.arange(token.shape[0], device=token.device) - (per_member.cumsum(0) - per_member)[member]
    fits = (member < members) & (by.row_in_member < rows) & (number < room)
    row_slot = torch.where(fits, member * rows + by.row_in_member, members * rows)
    pair_slot = torch.where(fits, member * room + number, members * room)
    place = _filled(members * room, 0, pair_slot, by.row_in_member)
    local = _filled(members * room, each, pair_slot, expert % each)
    return Slots(
        _filled(members * rows, num_tokens, row_slot, token),
        _filled(members * room, token.shape[0], pair_slot, by.order),
        torch.stack([place, local], 1).to(torch.int32),
        asked.sum() - fits.sum(),
    )


def _filled(size: int, default: int, slot: Tensor, value: Tensor) -> Tensor:
    """[size] of ``default``, with values in their slots; those for slot ``size`` are left out."""
    return value.new_full((size + 1,), default).scatter_(0, slot, value)[:-1]


def _equal(level: Level, rows: int, pairs_per_row: int, device: torch.device) -> Splits:
    size, pairs = level.peers.size, rows * pairs_per_row
    arriving = torch.stack([torch.full((size,), n, device=device) for n in (rows, pairs)])
    return Splits([rows] * size, [pairs] * size, [rows] * size, [pairs] * size, arriving)


def _without_padding(level: Level, mix: Mix) -> Carried:
    """The experts' work with a row more, to which the padding belongs."""

    def carried(x: Tensor, row: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        row = torch.where(expert < level.experts_each, row, x.shape[0])
        return mix(torch.cat([x, x.new_zeros(1, x.shape[1])]), row, expert, weight, None)[:-1]

    return carried
