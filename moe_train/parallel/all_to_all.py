"""Asynchronous all-to-alls that overlap with other computation, in forward and in backward.

``start_all_to_alls`` and ``wait_all_to_alls`` are two nodes of the autograd graph. Backward runs nodes in reverse
order, so the gradients of what was computed between the two in forward are computed while the gradients of the rows
are being sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.parallel.traffic import LinkType, TrafficCounters


@dataclass(frozen=True)
class CommGroup:
    """A process group, with the link to each of its members.

    Attributes:
        group: the process group.
        links: type of link between this process and each member.
        counters: count the traffic.
    """

    group: dist.ProcessGroup
    links: tuple[LinkType, ...]
    counters: TrafficCounters

    @property
    def size(self) -> int:
        """Number of members, including this process."""
        return len(self.links)


class AllToAll:
    """One asynchronous ``all_to_all_single`` with uneven splits along dimension 0.

    Args:
        send, receive: number of rows sent to and received from each member.
        payload: whether its bytes are counted as payload or as metadata.
    """

    def __init__(self, group: CommGroup, send: Sequence[int], receive: Sequence[int], payload: bool = False) -> None:
        self.group, self.send, self.receive = group, list(send), list(receive)
        self.counted = "payload_bytes" if payload else "metadata_bytes"
        self._in_progress: tuple[Any, Tensor, Tensor] | None = None

    def start(self, value: Tensor, reverse: bool = False) -> Tensor:
        """Sends value [Σ send, …] (``reverse``: [Σ receive, …]). The result must not be read before :meth:`wait`."""
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        result = value.new_empty(sum(receive), *value.shape[1:])
        value = value.contiguous()
        work = dist.all_to_all_single(result, value, receive, send, group=self.group.group, async_op=True)
        self._in_progress = work, result, value  # the sent buffer must stay alive until the collective has finished
        size = math.prod(value.shape[1:]) * value.element_size()
        self.group.counters.add(self.group.links, **{self.counted: [n * size for n in send]})
        return result

    def wait(self) -> Tensor:
        """Waits for and returns the result of the last :meth:`start` (on a GPU the stream waits, not the host)."""
        assert self._in_progress is not None
        work, result, _ = self._in_progress
        work.wait()
        self._in_progress = None
        return result


@dataclass
class DispatchAllToAlls:
    """The all-to-alls of one dispatch level.

    Attributes:
        rows: for rows [R, d] and their gradients.
        pairs: for the ids and weights of the pairs, sent together as [P, 2 + w] int32.
        weight_gradients: for the gradients of the weights.
        ids: [P, 2] int32 ids of the pairs sent; after the wait [P', 2] ids of the pairs received.
    """

    rows: AllToAll
    pairs: AllToAll
    weight_gradients: AllToAll
    ids: Tensor


def start_all_to_alls(calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Starts sending rows [R, d] and the weights [P] (fp32 or fp64) of their pairs.

    Backward always returns the gradients of both, even if this rank needs neither, so that all ranks run the same
    collectives.

    Returns:
        Buffers for :func:`wait_all_to_alls`; they must not be read before it.
    """
    return _Start.apply(calls, rows, weight)  # type: ignore[no-any-return, no-untyped-call]


def wait_all_to_alls(calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Waits for :func:`start_all_to_alls` and returns the received rows [R', d] and weights [P']."""
    return _Wait.apply(calls, rows, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.calls = calls
        bits = weight.contiguous().view(torch.int32).view(weight.shape[0], weight.element_size() // 4)
        calls.pairs.start(torch.cat([calls.ids, bits], 1))
        return calls.rows.start(rows), weight.new_empty(sum(calls.pairs.receive))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, ctx.calls.rows.wait(), ctx.calls.weight_gradients.wait()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.calls = calls
        pairs = calls.pairs.wait()
        calls.ids, bits = pairs[:, :2], pairs[:, 2:]
        calls.rows.wait()
        return rows, bits.contiguous().view(weight.dtype).view(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weight: Tensor) -> tuple[None, Tensor, Tensor]:
        ctx.calls.rows.start(grad_rows, reverse=True)
        ctx.calls.weight_gradients.start(grad_weight, reverse=True)
        # Placeholders of the shapes that autograd checks; _Start.backward reads the results from the all-to-alls.
        return None, grad_rows, grad_weight


def return_rows(call: AllToAll, rows: Tensor) -> Tensor:
    """Sends rows [Σ send, d] and returns the rows received [Σ receive, d]; backward sends gradients in reverse."""
    return _Return.apply(call, rows)  # type: ignore[no-any-return, no-untyped-call]


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: AllToAll, rows: Tensor) -> Tensor:
        ctx.call = call
        call.start(rows)
        return call.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.call.start(grad, reverse=True)
        return None, ctx.call.wait()
