"""The processes that train together: collectives over them, and the progress marker of each."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class ProgressMarker:
    """Progress of a process; set by the training loop, read by the hang watchdog from another thread.

    Attributes:
        beats: number of marks so far; unchanged means no progress.
        update: the update being computed, counted from 1; 0 before the first.
        phase: what is being done.
        run: the run folder, once it is known.
    """

    beats: int = 0
    update: int = 0
    phase: str = "getting ready"
    run: Path | None = None

    def mark(self, phase: str, update: int | None = None) -> None:
        """Records that a phase begins."""
        if update is not None:
            self.update = update
        self.phase = phase
        self.beats += 1


@dataclass(frozen=True)
class World:
    """This process's place among the processes, and collectives over all of them.

    ``group`` None is the default process group. For reductions inside models there is
    :class:`moe_train.parallel.reducers.DistReduction`.

    Attributes:
        rank: 0 .. size - 1; rank 0 writes files and prints.
        local_rank: number of this process on its host, which picks the GPU.
        local_size: processes on this host.
        progress: this process's progress marker.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    progress: ProgressMarker = field(default_factory=ProgressMarker, compare=False, repr=False)

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
        """Rank 0's value, on every rank.

        Args:
            value: what JSON holds (a tuple is returned as a list); ignored on ranks other than 0. It is sent as
                JSON: nothing that another process sends can run code here.
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.main else b""
        length = torch.tensor([len(text)], device=self._where)
        dist.broadcast(length, src=0, group=self.group)
        content = _bytes(text, int(length), self._where)
        dist.broadcast(content, src=0, group=self.group)
        result: T = json.loads(content.cpu().numpy().tobytes())
        return result

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on every rank; values as those of :meth:`broadcast`."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._where) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)], device=self._where), group=self.group)
        longest = max(int(length) for length in lengths)
        contents = [_bytes(b"", longest, self._where) for _ in range(self.size)]
        dist.all_gather(contents, _bytes(text, longest, self._where), group=self.group)
        pairs = zip(contents, lengths, strict=True)
        return [json.loads(content[: int(length)].cpu().numpy().tobytes()) for content, length in pairs]

    @property
    def _where(self) -> torch.device:
        """The device of the tensors that values are sent in: the CPU, unless NCCL is the only backend."""
        return self.device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")


def _bytes(text: bytes, length: int, device: torch.device) -> Tensor:
    """``text`` as a tensor of ``length`` bytes, filled up with zeros."""
    return torch.frombuffer(bytearray(text.ljust(length, b"\0")), dtype=torch.uint8).to(device)
