"""Split sizes of the all-to-alls of a layer, counted on the device and read by the host once for all levels.

A pair is one (token, expert) choice. A row is one token sent once to one member of a group, for all its pairs there.
A read by the host stalls host and device, so ranks first exchange all sizes that the layer needs:

- rows per member;
- with two levels, also rows per rank of the member's node;
- pairs per expert, from which the row counts of the experts' products follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.all_to_all import AllToAll, CommGroup
from moe_train.parallel.permute import count_ids


@dataclass(frozen=True)
class DispatchLevel:
    """One dispatch level: member m holds experts m · experts_per_member to (m + 1) · experts_per_member - 1."""

    group: CommGroup
    experts_per_member: int


@dataclass(frozen=True)
class SplitSizes:
    """Split sizes of one level. Lists have one entry per member and are on the host.

    Attributes:
        received_counts: [2, members] received rows and pairs, on the device.
    """

    send_rows: list[int]
    send_pairs: list[int]
    receive_rows: list[int]
    receive_pairs: list[int]
    received_counts: Tensor

    def first_row_of_pairs(self) -> Tensor:
        """[P']: for each received pair, the first row from the member that sent it."""
        rows, pairs = self.received_counts
        return torch.repeat_interleave(rows.cumsum(0) - rows, pairs, output_size=sum(self.receive_pairs))


@dataclass(frozen=True)
class SortedPairs:
    """Pairs sorted by member and token; each distinct (member, token) is one row.

    Attributes:
        order: [P] pair at each sorted position.
        row: [P] row of each sorted pair, numbered over all members.
        row_in_member: [P], numbered within the member.
        rows_per_member: [members].
    """

    order: Tensor
    row: Tensor
    row_in_member: Tensor
    rows_per_member: Tensor


@torch.no_grad()
def sort_pairs(token: Tensor, member: Tensor, num_tokens: int, members: int) -> SortedPairs:
    """Sorts pairs by member and token, without a host sync.

    Args:
        token: [P] in 0 .. num_tokens - 1.
        member: [P] in 0 .. members - 1.
    """
    key = member * num_tokens + token
    order = torch.argsort(key, stable=True)
    key, member = key[order], member[order]
    is_new_row = torch.ones_like(key)
    is_new_row[1:] = (key[1:] != key[:-1]).to(key.dtype)
    row = is_new_row.cumsum(0) - 1
    per_member = key.new_zeros(members).scatter_add_(0, member, is_new_row)
    first_row_of_member = per_member.cumsum(0) - per_member
    return SortedPairs(order, row, row - first_row_of_member[member], per_member)


@torch.no_grad()
def exchange_split_sizes(
    pairs: SortedPairs,
    token: Tensor,
    expert: Tensor,
    num_tokens: int,
    levels: Sequence[DispatchLevel],
    load: Tensor | None = None,
) -> tuple[list[SplitSizes], list[int]]:
    """Exchanges the sizes of all levels and reads them in one transfer: the only host sync of the layer.

    Args:
        pairs: sorted by the members of the first level.
        token, expert: [P] of the unsorted pairs; global expert ids.
        levels: one (ranks), or two (nodes, then the ranks of a node).
        load: [E] int64, pairs of each expert, if they have been counted.

    Returns:
        The split sizes of each level, and the number of pairs of each local expert.
    """
    first, last = levels[0], levels[-1]
    members = first.group.size
    load = count_ids(expert, members * first.experts_per_member) if load is None else load
    per_expert = load.view(members, -1)
    # Columns: rows | with two levels, rows per inner rank | pairs per expert.
    columns = [pairs.rows_per_member.unsqueeze(1), per_expert]
    if len(levels) == 2:
        ranks = members * last.group.size
        inner = sort_pairs(token, expert // last.experts_per_member, num_tokens, ranks)
        columns.insert(1, inner.rows_per_member.view(members, -1))
    sent = torch.cat(columns, 1)
    received = _exchange_counts(sent, first.group)
    counts = [(_rows_and_pairs(sent, first.experts_per_member), _rows_and_pairs(received, first.experts_per_member))]
    if len(levels) == 2:
        rows, per_expert = received.sum(0)[1:].split([last.group.size, first.experts_per_member])
        sent = torch.cat([rows.unsqueeze(1), per_expert.view(last.group.size, -1)], 1)
        received = _exchange_counts(sent, last.group)
        counts.append(
            (_rows_and_pairs(sent, last.experts_per_member), _rows_and_pairs(received, last.experts_per_member))
        )
    pairs_per_local_expert = received[:, -last.experts_per_member :].sum(0)
    # Per level: sent rows, sent pairs, received rows, received pairs; each is [members].
    parts = [row for sent_and_received in counts for part in sent_and_received for row in part]
    numbers = first.group.counters.read(torch.cat([*parts, pairs_per_local_expert]))
    on_host, position = list[list[int]](), 0
    for part in parts:
        on_host.append(numbers[position : position + part.shape[0]])
        position += part.shape[0]
    sizes = []
    for level, (_, received_counts) in enumerate(counts):
        send_rows, send_pairs, receive_rows, receive_pairs = on_host[4 * level : 4 * level + 4]
        sizes.append(SplitSizes(send_rows, send_pairs, receive_rows, receive_pairs, received_counts))
    return sizes, numbers[position:]


def _exchange_counts(sent: Tensor, group: CommGroup) -> Tensor:
    """All-to-all of sent [members, …]: row m goes to member m → row m comes from member m."""
    ones = [1] * group.size
    call = AllToAll(group, ones, ones)
    call.start(sent)
    return call.wait()


def _rows_and_pairs(counts: Tensor, experts: int) -> Tensor:
    """Rows and pairs per member [2, members], from counts [members, (rows, …, pairs of each expert)]."""
    return torch.stack([counts[:, 0], counts[:, -experts:].sum(1)])
