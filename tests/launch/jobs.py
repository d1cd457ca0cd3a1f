"""What launched processes do in tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe_train.config import LaunchConfig
from moe_train.errors import DataError
from moe_train.launch.joining import joined_world

CONFIG = LaunchConfig(timeout_minutes=0.5)


def report(word: str) -> dict[str, Any]:
    """Sums over the world, and says who it is."""
    with joined_world(CONFIG) as world:
        print(f"{word} from {world.rank}", flush=True)
        value = float(world.sum(torch.tensor([float(world.rank + 1)])))
        gathered = world.gather({"rank": world.rank})
        told = world.broadcast(f"told by {world.rank}")
        threads = torch.get_num_threads()
        return {
            "rank": world.rank,
            "size": world.size,
            "sum": value,
            "all": gathered,
            "told": told,
            "threads": threads,
            "command": sys.argv,
        }


def fail(rank: int, how: str, others: str = "wait") -> None:
    """Rank ``rank`` fails; the others wait for it in a collective, or sleep."""
    with joined_world(CONFIG) as world:
        world.barrier()
        if world.rank == rank:
            _fail(how)
        if others == "sleep":
            time.sleep(60)
        world.barrier()


def _fail(how: str) -> None:
    if how == "defect":
        raise ZeroDivisionError("planted defect")
    if how == "user":
        raise DataError("the planted line is too long", "planted.txt", "shorten it")
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(folder: str) -> str:
    """Until a signal comes."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    rank = os.environ["RANK"]
    Path(folder, f"ready_{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
    return f"rank {rank} got {received}"
