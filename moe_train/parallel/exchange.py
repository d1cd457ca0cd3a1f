"""Tokens to the ranks that hold their experts, and mixed rows back.

A token travels once to each destination that holds any of its experts, with the numbers and weights of those experts;
there its outputs are mixed in fp32 and one row comes back. So k experts on one destination cost one row each way
whatever k is (SAM's promise), and k experts anywhere never more than min(k, destinations) rows.

``all_to_all_single`` only, counts first, one host sync. Every rank runs the same collectives in forward and in
backward, whatever its share is, so an empty rank cannot make others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.parallel.counters import Link, TrafficCounters
from moe_train.parallel.rows import TokenRows, gather_rows, mix_rows

Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [R, d], row [P], expert [P], weight [P]) → Σ weight · f_expert(x_row) [R, d] in at least fp32; experts count from
0 among those that the destination holds."""


@dataclass(frozen=True)
class Peers:
    """One level of exchange: the members of a group, each a destination.

    Attributes:
        group: the process group.
        links: what lies between this process and each member.
        counters: where traffic is counted.
    """

    group: dist.ProcessGroup
    links: tuple[Link, ...]
    counters: TrafficCounters

    @property
    def size(self) -> int:
        """Members, this process included."""
        return len(self.links)


@dataclass(frozen=True)
class _Splits:
    """Numbers per member, on the host: what goes to it and what comes from it."""

    send_rows: list[int]
    send_pairs: list[int]
    receive_rows: list[int]
    receive_pairs: list[int]


def exchange(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, experts_each: int, mix: Mix, peers: Peers
) -> Tensor:
    """y_t = Σ over pairs (t, e, w) of w · f_e(x_t), the experts divided over a group.

    Args:
        x: [T, d].
        token: [P] int64, row of x.
        expert: [P] int64; member m holds experts m·experts_each to (m + 1)·experts_each - 1.
        weight: [P], differentiable.
        experts_each: experts of each member.
        mix: what a destination does with what arrives.
        peers: the group.

    Returns:
        [T, d] in at least fp32; the payload travels in x's type.
    """
    if torch.is_grad_enabled() and not x.requires_grad:
        # All ranks must meet in backward's collectives, also where this one's tokens happen to need no gradient.
        x = x.detach().requires_grad_()
    destination = expert // experts_each
    rows, pair_order, pair_row, send = _rows_of(token, destination, x.shape[0], peers.size)
    splits = _exchange_counts(send, peers)
    meta = torch.stack([pair_row, expert[pair_order] % experts_each], 1).to(torch.int32)
    received_meta = _all_to_all(meta, splits.send_pairs, splits.receive_pairs, peers.group).long()
    received, received_weight = _dispatch(gather_rows(x, rows), weight[pair_order], splits, peers)
    row = received_meta[:, 0] + _first_rows(splits, x.device)
    mixed = mix(received, row, received_meta[:, 1], received_weight)
    returned = _return(mixed.to(x.dtype), splits, peers)
    _count(x, weight, splits, peers)
    return mix_rows(returned, None, rows)


@torch.no_grad()
def _rows_of(
    token: Tensor, destination: Tensor, num_tokens: int, members: int
) -> tuple[TokenRows, Tensor, Tensor, Tensor]:
    """Each (destination, token) once.

    Returns:
        the rows, in destination order; ``pair_order`` [P], pairs in the same order; ``pair_row`` [P], for each of these
        its row, counted from the destination's first; rows and pairs per member [members, 2].
    """
    key = destination * num_tokens + token
    pair_order = torch.argsort(key, stable=True)
    unique, row, _ = torch.unique_consecutive(key[pair_order], return_inverse=True, return_counts=True)
    row_destination = unique // max(num_tokens, 1)
    per_row = torch.bincount(row_destination, minlength=members)
    per_pair = torch.bincount(destination, minlength=members)
    first = per_row.cumsum(0) - per_row
    rows = TokenRows.of_tokens(unique - row_destination * num_tokens, num_tokens)
    return rows, pair_order, row - first[destination[pair_order]], torch.stack([per_row, per_pair], 1)


def _first_rows(splits: _Splits, device: torch.device) -> Tensor:
    """For each pair that arrives, the first row of the member that it comes from."""
    rows, pairs = torch.tensor([splits.receive_rows, splits.receive_pairs], device=device)
    return torch.repeat_interleave(rows.cumsum(0) - rows, pairs, output_size=sum(splits.receive_pairs))


def _exchange_counts(send: Tensor, peers: Peers) -> _Splits:
    """The layer's one host sync. send [members, 2]: rows and pairs for each."""
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=peers.group)
    sent, got = torch.stack([send, received]).tolist()
    return _Splits([r for r, _ in sent], [p for _, p in sent], [r for r, _ in got], [p for _, p in got])


def _all_to_all(value: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    result = value.new_empty(sum(receive), *value.shape[1:])
    dist.all_to_all_single(result, value.contiguous(), list(receive), list(send), group=group)
    return result


class _Dispatch(torch.autograd.Function):
    """Rows and weights to their destinations. Both gradients always travel back, so that ranks never disagree."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, splits: _Splits, peers: Peers) -> tuple[Tensor, Tensor]:
        ctx.splits, ctx.peers, ctx.weight_type = splits, peers, weight.dtype
        return (
            _all_to_all(rows, splits.send_rows, splits.receive_rows, peers.group),
            _all_to_all(weight, splits.send_pairs, splits.receive_pairs, peers.group),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor, None, None]:
        splits: _Splits = ctx.splits
        peers: Peers = ctx.peers
        _count_gradients(grad_rows, grad_weight, splits, peers)
        return (
            _all_to_all(grad_rows, splits.receive_rows, splits.send_rows, peers.group),
            _all_to_all(grad_weight, splits.receive_pairs, splits.send_pairs, peers.group),
            None,
            None,
        )


class _Return(torch.autograd.Function):
    """Mixed rows back to where their tokens live."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: _Splits, peers: Peers) -> Tensor:
        ctx.splits, ctx.peers = splits, peers
        return _all_to_all(rows, splits.receive_rows, splits.send_rows, peers.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        splits: _Splits = ctx.splits
        peers: Peers = ctx.peers
        size = grad.shape[1] * grad.element_size()
        peers.counters.add(peers.links, payload_bytes=[n * size for n in splits.send_rows])
        return _all_to_all(grad, splits.send_rows, splits.receive_rows, peers.group), None, None


def _dispatch(rows: Tensor, weight: Tensor, splits: _Splits, peers: Peers) -> tuple[Tensor, Tensor]:
    return _Dispatch.apply(rows, weight, splits, peers)  # type: ignore[no-any-return, no-untyped-call]


def _return(rows: Tensor, splits: _Splits, peers: Peers) -> Tensor:
    return _Return.apply(rows, splits, peers)  # type: ignore[no-any-return, no-untyped-call]


def _count(x: Tensor, weight: Tensor, splits: _Splits, peers: Peers) -> None:
    """Forward's traffic: rows out and rows back, numbers and weights of pairs, counts."""
    size = x.shape[1] * x.element_size()
    pair = 2 * 4 + weight.element_size()
    peers.counters.add(
        peers.links,
        dispatched_rows=splits.send_rows,
        returned_rows=splits.receive_rows,
        payload_bytes=[(n + m) * size for n, m in zip(splits.send_rows, splits.receive_rows, strict=True)],
        metadata_bytes=[n * pair + 2 * 8 for n in splits.send_pairs],
    )


def _count_gradients(grad_rows: Tensor, grad_weight: Tensor, splits: _Splits, peers: Peers) -> None:
    size = grad_rows.shape[1] * grad_rows.element_size()
    peers.counters.add(
        peers.links,
        payload_bytes=[n * size for n in splits.receive_rows],
        metadata_bytes=[n * grad_weight.element_size() for n in splits.receive_pairs],
    )
