"""All-to-alls that run while something else is computed, in backward too.

``start_all_to_alls`` and ``wait_all_to_alls`` are two nodes of the autograd graph. Backward runs nodes in the
reverse of their order, so what was computed between the two in forward has its gradients computed while the gradients
of the rows are on their way.
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
    """The members of one process group, each a destination of an all-to-all.

    Attributes:
        group: the process group.
        links: the kind of link between this process and each member.
        counters: where traffic is counted.
    """

    group: dist.ProcessGroup
    links: tuple[LinkType, ...]
    counters: TrafficCounters

    @property
    def size(self) -> int:
        """Members, this process included."""
        return len(self.links)


class AllToAll:
    """One asynchronous ``all_to_all_single`` with uneven splits along dimension 0.

    Args:
        send, receive: rows for each member and from each member.
        payload: whether its bytes count as payload, else as metadata.
    """

    def __init__(self, group: CommGroup, send: Sequence[int], receive: Sequence[int], payload: bool = False) -> None:
        self.group, self.send, self.receive = group, list(send), list(receive)
        self.counted = "payload_bytes" if payload else "metadata_bytes"
        self._in_progress: tuple[Any, Tensor, Tensor] | None = None

    def start(self, value: Tensor, reverse: bool = False) -> Tensor:
        """Sends value [Σ send, …], in reverse [Σ receive, …]; the result may be read after :meth:`wait`."""
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        result = value.new_empty(sum(receive), *value.shape[1:])
        value = value.contiguous()
        work = dist.all_to_all_single(result, value, receive, send, group=self.group.group, async_op=True)
        self._in_progress = work, result, value  # what is sent must live until it has arrived
        size = math.prod(value.shape[1:]) * value.element_size()
        self.group.counters.add(self.group.links, **{self.counted: [n * size for n in send]})
        return result

    def wait(self) -> Tensor:
        """The result of the last :meth:`start` (on a GPU the stream waits, not the host)."""
        assert self._in_progress is not None
        work, result, _ = self._in_progress
        work.wait()
        self._in_progress = None
        return result


@dataclass
class DispatchAllToAlls:
    """The all-to-alls of one level of a dispatch.

    Attributes:
        rows: of rows [R, d], and of their gradients.
        pairs: of the pairs' ids and weights, which travel together as [P, 2 + w] int32.
        weight_gradients: of the gradients of the weights.
        ids: [P, 2] int32 of the pairs that are sent, then [P', 2] of those that arrived.
    """

    rows: AllToAll
    pairs: AllToAll
    weight_gradients: AllToAll
    ids: Tensor


def start_all_to_alls(calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sends rows [R, d] and the weights [P] (fp32 or fp64) of their pairs.

    The gradients of both always come back, whatever this rank needs, so that all ranks run the same collectives.

    Returns:
        Buffers for :func:`wait_all_to_alls`; they must not be read before.
    """
    return _Start.apply(calls, rows, weight)  # type: ignore[no-any-return, no-untyped-call]


def wait_all_to_alls(calls: DispatchAllToAlls, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Waits for what :func:`start_all_to_alls` has started: the rows [R', d] and weights [P'] that arrived."""
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
    def backward(ctx: Any, by_rows: Tensor, by_weight: Tensor) -> tuple[None, Tensor, Tensor]:
        ctx.calls.rows.start(by_rows, reverse=True)
        ctx.calls.weight_gradients.start(by_weight, reverse=True)
        # In the shapes that autograd wants here; what comes back, _Start takes from the all-to-alls.
        return None, by_rows, by_weight


def return_rows(call: AllToAll, rows: Tensor) -> Tensor:
    """Sends rows [Σ send, d] and waits for those that come [Σ receive, d]; the gradients take the reverse way."""
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
