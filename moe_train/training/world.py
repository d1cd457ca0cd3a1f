"""The processes that train together, as the loop sees them: one of them alone, or a torch.distributed world."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.training.pulse import Pulse

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who we are among the processes, and the few collectives that the loop needs.

    ``group`` None is the default process group. For reductions inside models there is
    :class:`moe_train.parallel.ranks.ProcessRanks`.

    Attributes:
        rank: 0 .. size - 1; rank 0 writes files and speaks.
        local_rank: our number on this host, which picks the GPU.
        local_size: processes on this host.
        pulse: how far this process has come.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> World:
        """The world of the default process group, or one process where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=torch.device(device))
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return cls(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.device(device))

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank; ``value`` is left as it is."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, on every rank; ``value`` is left as it is."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        result = value.detach().clone()
        dist.all_reduce(result, op=operation, group=self.group)
        return result

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def broadcast(self, value: T) -> T:
        """Rank 0's object, on every rank (small objects of our own processes only)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's object in rank order, on every rank (small objects of our own processes only)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values
