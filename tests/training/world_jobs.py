"""What ranks tell one another, and a rank that sends a pickle which would run code where it is built."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.errors import CheckpointError, UserError
from moe_train.training.checkpoint.dcp import save_tensors
from moe_train.training.checkpoint.store import run_on_all_ranks
from moe_train.training.runtime.world import World


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def broadcast_from_rank0(value: Any) -> tuple[Any, list[Any]]:
    """Rank 0's value, and every rank's."""
    world = World.current()
    return world.broadcast(value if world.main else None), world.gather([world.rank, value])


def failed(kind: str) -> tuple[type[BaseException], tuple[Any, ...], bool]:
    """The error that rank 1 meets, as this rank sees it; whether it is the one that rank 1 raised."""
    world = World.current()
    error = {
        "user": CheckpointError("the tensor 'ü' is missing", "a/b", "train again"),
        "system": FileNotFoundError(2, "No such file or directory", "a/b"),
    }[kind]

    def act() -> None:
        if world.rank == 1:
            raise error

    try:
        run_on_all_ranks(world, act)
    except (OSError, UserError) as seen:
        arguments = (seen.errno, seen.filename) if isinstance(seen, OSError) else seen.args
        return type(seen), arguments, seen is error
    raise AssertionError("nothing was raised")


def _gather_raw(content: bytes) -> None:
    """Takes part in a gather of two ranks with bytes of its own, and builds nothing of what comes."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(lengths, torch.tensor([len(content)]))
    longest = max(int(length) for length in lengths)
    own = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
    dist.all_gather([torch.empty_like(own) for _ in range(2)], own)


def bombed(folder: str, way: str) -> str:
    """One rank sends a bomb, the other one what it does with it; the error's name."""
    world, bomb = World.current(), Bomb(f"{folder}/built-{way}")
    try:
        if way == "broadcast":
            dist.broadcast_object_list([bomb], src=0) if world.main else world.broadcast(None)
        elif way == "gather":
            _gather_raw(pickle.dumps(bomb)) if world.main else world.gather("x" * 200)
        elif world.main:
            save_tensors(Path(folder), {"a": torch.ones(2)})
        else:
            dist.gather_object(bomb, dst=0)
    except (ValueError, pickle.UnpicklingError) as error:
        return type(error).__name__
    return ""
