"""All-to-alls that are begun, and waited for later: in backward the same way in reverse.

``begin`` and ``end`` are two nodes of the graph. Backward runs nodes in the reverse of their order, so what was
computed between the two in forward has its gradients computed while the gradients of the rows travel.
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

from moe_train.parallel.counters import Link, TrafficCounters


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


class Flight:
    """One all-to-all: how many rows go to each member and come from it, and what is under way just now.

    Args:
        payload: whether its bytes count as payload, else as metadata.
    """

    def __init__(self, peers: Peers, send: Sequence[int], receive: Sequence[int], payload: bool = False) -> None:
        self.peers, self.send, self.receive = peers, list(send), list(receive)
        self.counted = "payload_bytes" if payload else "metadata_bytes"
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, value: Tensor, back: bool = False) -> Tensor:
        """Sends value [Σ send, …], or [Σ receive, …] on the way back; the result may be read after :meth:`wait`."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        result = value.new_empty(sum(receive), *value.shape[1:])
        value = value.contiguous()
        work = dist.all_to_all_single(result, value, receive, send, group=self.peers.group, async_op=True)
        self._under_way = work, result, value  # what is sent must live until it has arrived
        size = math.prod(value.shape[1:]) * value.element_size()
        self.peers.counters.add(self.peers.links, **{self.counted: [n * size for n in send]})
        return result

    def wait(self) -> Tensor:
        """What was started last, once it is there (on a GPU the stream waits, not the host)."""
        assert self._under_way is not None
        work, result, _ = self._under_way
        work.wait()
        self._under_way = None
        return result


Flights = tuple[Flight, ...]


def begin(flights: Flights, *values: Tensor) -> tuple[Tensor, ...]:
    """Starts a flight for each value; the results must not be read before :func:`end`.

    The gradients of all values always travel back, so that ranks never disagree on what they do.
    """
    return _Begin.apply(flights, *values)  # type: ignore[no-any-return, no-untyped-call]


def end(flights: Flights, *buffers: Tensor) -> tuple[Tensor, ...]:
    """Waits for what :func:`begin` has started."""
    return _End.apply(flights, *buffers)  # type: ignore[no-any-return, no-untyped-call]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flights: Flights, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.flights = flights
        return tuple(flight.start(value) for flight, value in zip(flights, values, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(flight.wait() for flight in ctx.flights)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flights: Flights, *buffers: Tensor) -> tuple[Tensor, ...]:
        ctx.flights = flights
        for flight in flights:
            flight.wait()
        return buffers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for flight, grad in zip(ctx.flights, grads, strict=True):
            flight.start(grad, back=True)
        return None, *grads  # in the shape that autograd wants here; what comes back, _Begin takes from its flight
