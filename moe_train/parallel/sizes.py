"""Who sends how much to whom: counted on the device, told to the host once, whatever the levels and chunks.

A host that reads a number waits for the device, and the device then for the host. So ranks first exchange all that any
later step of the layer must know: rows for each member, for each rank behind it where there are two levels, and the
pairs of each expert, from which the experts' products know their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.flights import Flight, Peers
from moe_train.parallel.rows import count_ids


@dataclass(frozen=True)
class Level:
    """One step of an exchange: member m stands for experts m · experts_each to (m + 1) · experts_each - 1."""

    peers: Peers
    experts_each: int


@dataclass(frozen=True)
class Splits:
    """One level of one chunk. Lists have a number per member and live on the host.

    Attributes:
        arriving: [2, members] the last two once more, on the device, so that they need not go up again.
    """

    send_rows: list[int]
    send_pairs: list[int]
    receive_rows: list[int]
    receive_pairs: list[int]
    arriving: Tensor

    def first_rows(self) -> Tensor:
        """For each pair that arrives, the first row of the member that it comes from."""
        rows, pairs = self.arriving
        return torch.repeat_interleave(rows.cumsum(0) - rows, pairs, output_size=sum(self.receive_pairs))


@dataclass(frozen=True)
class ChunkSizes:
    """One chunk: its levels, and the pairs of each expert held here."""

    levels: tuple[Splits, ...]
    experts: list[int]


@dataclass(frozen=True)
class SortedPairs:
    """Pairs in the order of chunk, destination, token; each (destination, token) is one row.

    Attributes:
        order: [P] which pair stands where.
        row: [P] of the sorted pairs, counted over all rows.
        row_in_member: [P], counted from its destination's first.
        rows_per_bin: [chunks · members].
    """

    order: Tensor
    row: Tensor
    row_in_member: Tensor
    rows_per_bin: Tensor


@torch.no_grad()
def sort_pairs(token: Tensor, bin_: Tensor, num_tokens: int, bins: int) -> SortedPairs:
    """Sorts pairs by bin and token; no number leaves the device.

    Args:
        token: [P] in 0 .. num_tokens - 1.
        bin_: [P] in 0 .. bins - 1.
    """
    key = bin_ * num_tokens + token
    order = torch.argsort(key, stable=True)
    key, bin_ = key[order], bin_[order]
    begins = torch.ones_like(key)
    begins[1:] = (key[1:] != key[:-1]).to(key.dtype)
    row = begins.cumsum(0) - 1
    per_bin = key.new_zeros(bins).scatter_add_(0, bin_, begins)
    return SortedPairs(order, row, row - (per_bin.cumsum(0) - per_bin)[bin_], per_bin)


@torch.no_grad()
def agree(
    pairs: SortedPairs,
    token: Tensor,
    expert: Tensor,
    num_tokens: int,
    chunk: Tensor,
    chunks: int,
    levels: Sequence[Level],
) -> list[ChunkSizes]:
    """Exchanges the sizes of all chunks and levels, and brings them to the host in one go.

    Args:
        pairs: sorted by chunk and by the first level's members.
        token, expert, chunk: [P] of the pairs, unsorted; experts are numbered over the group.
        levels: one, or two (nodes, then ranks of a node).
    """
    first, last = levels[0], levels[-1]
    members, experts = first.peers.size, first.peers.size * first.experts_each
    per_expert = count_ids(chunk * experts + expert, chunks * experts).view(chunks, members, -1)
    columns = [pairs.rows_per_bin.view(chunks, members, 1), per_expert]
    if len(levels) == 2:
        ranks = members * last.peers.size
        inner = sort_pairs(token, chunk * ranks + expert // last.experts_each, num_tokens, chunks * ranks)
        columns.insert(1, inner.rows_per_bin.view(chunks, members, -1))
    sent = torch.cat(columns, 2).transpose(0, 1).contiguous()
    got = _swap(sent, first.peers)
    both = [(_rows_and_pairs(sent, first.experts_each), _rows_and_pairs(got, first.experts_each))]
    if len(levels) == 2:
        arrived = got.sum(0)[:, 1:]  # [chunks, ranks + experts of the node]
        rows, each = arrived.split([last.peers.size, first.experts_each], 1)
        each = each.view(chunks, last.peers.size, last.experts_each)
        sent = torch.cat([rows.unsqueeze(2), each], 2).transpose(0, 1).contiguous()
        got = _swap(sent, last.peers)
        both.append((_rows_and_pairs(sent, last.experts_each), _rows_and_pairs(got, last.experts_each)))
    held = got[:, :, -last.experts_each :].sum(0)
    return _on_host(both, held, first.peers)


def _swap(sent: Tensor, peers: Peers) -> Tensor:
    """sent [members, …] → what each member has sent here."""
    ones = [1] * peers.size
    flight = Flight(peers, ones, ones)
    received = flight.start(sent)
    flight.wait()
    return received


def _rows_and_pairs(counts: Tensor, experts: int) -> Tensor:
    """[2, chunks, members] of counts [members, chunks, rows … pairs of each expert]."""
    return torch.stack([counts[:, :, 0], counts[:, :, -experts:].sum(2)]).transpose(1, 2)


def _on_host(both: Sequence[tuple[Tensor, Tensor]], held: Tensor, peers: Peers) -> list[ChunkSizes]:
    """The layer's one host sync."""
    parts = [part for pair in both for part in pair]
    numbers = peers.counters.read(torch.cat([part.reshape(-1) for part in (*parts, held)]))
    chunks, found = held.shape[0], []
    for part in (*parts, held.unsqueeze(0)):
        size, width = part.numel(), part.shape[-1]
        flat, numbers = numbers[:size], numbers[size:]
        found.append([flat[i : i + width] for i in range(0, size, width)])  # by kind, then by chunk
    return [
        ChunkSizes(tuple(_splits(found, n, c, chunks, got) for n, (_, got) in enumerate(both)), found[-1][c])
        for c in range(chunks)
    ]


def _splits(found: Sequence[Sequence[list[int]]], level: int, chunk: int, chunks: int, got: Tensor) -> Splits:
    sent, arriving = found[2 * level], found[2 * level + 1]
    return Splits(sent[chunk], sent[chunks + chunk], arriving[chunk], arriving[chunks + chunk], got[:, chunk])
