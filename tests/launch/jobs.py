"""What launched processes do in tests."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.config import LaunchConfig
from moe_train.errors import DataError, LaunchError
from moe_train.launch.job.failures import Failure
from moe_train.launch.job.job_channel import JobChannel, check_same_secret
from moe_train.launch.job.job_store import MessageSigner
from moe_train.launch.process_group import joined_world
from moe_train.training.runtime.world import World
from tests.launch import intruder

CONFIG = LaunchConfig(timeout_minutes=0.5)


@contextmanager
def in_time(folder: Path, limit: float) -> Iterator[str]:
    """What docs/faults.md promises: the job has ended half a minute after its limit at the latest.

    Gives the name of the file in which the rank notes when it begins to fail.

    Args:
        limit: seconds of ``launch.timeout_minutes``, counted from there.
    """
    note = folder / "note"
    yield str(note)
    assert time.time() - float(note.read_text()) < limit + 30


def report(word: str) -> dict[str, Any]:
    """Sums over the world, and says who it is. What would hang when the interpreter ends must not matter."""
    atexit.register(time.sleep, 3600)
    with joined_world(CONFIG) as world:
        print(f"{word} from {world.rank}", flush=True)
        value = float(world.sum(torch.tensor([float(world.rank + 1)])))
        gathered = world.gather({"rank": world.rank})
        told = world.broadcast(f"told by {world.rank}")
        threads = torch.get_num_threads()
        print("goodbye", end="")
        return {
            "rank": world.rank,
            "size": world.size,
            "sum": value,
            "all": gathered,
            "told": told,
            "threads": threads,
            "command": sys.argv,
        }


def fail(rank: int, how: str, others: str = "wait", note: str = "") -> None:
    """Rank ``rank`` fails; the others wait for it in a collective, or sleep. ``note``: a file for when it does."""
    with joined_world(CONFIG) as world:
        world.barrier()
        if world.rank == rank:
            _note(note)
            _fail(how)
        if others == "sleep":
            time.sleep(60)
        world.barrier()


def hang(rank: int | Collection[int], how: str, minutes: float = 0.1, note: str = "", silent: float = 0.0) -> None:
    """After two collectives ``rank``, one or several, never come to the third, for which the others wait."""
    config = dataclasses.replace(CONFIG, timeout_minutes=minutes, silent_minutes=silent)
    with joined_world(config) as world:
        world.progress.mark("warming up", 7)
        world.barrier()
        world.barrier()
        if world.rank in ({rank} if isinstance(rank, int) else rank):
            _note(note)
            _fall_asleep(how)
        world.sum(torch.ones(3))


def busy(minutes: float) -> float:
    """All ranks compute for three times the limit, without a collective."""
    with joined_world(dataclasses.replace(CONFIG, timeout_minutes=minutes)) as world:
        time.sleep(3 * 60 * minutes)
        return float(world.sum(torch.tensor([float(world.rank + 1)])))


def _note(path: str) -> None:
    if path:
        Path(path).write_text(str(time.time()))


def _fall_asleep(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "lock":  # in C code that keeps the interpreter's lock: no thread of Python's comes to a word
        ctypes.PyDLL(None).sleep(3600)
    time.sleep(3600)


def _fail(how: str) -> None:
    if how == "defect":
        raise ZeroDivisionError("planted defect")
    if how == "user":
        raise DataError("the planted line is too long", "planted.txt", "shorten it")
    if how == "memory":
        torch.empty(1 << 62, dtype=torch.uint8)
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


def besieged() -> dict[str, Any]:
    """Sums, lets another user of this host try to get in, then makes a group and sums again."""
    with joined_world(CONFIG) as world:
        before = float(world.sum(torch.tensor([float(world.rank + 1)])))
        group = dist.new_group()
        pids = [os.getppid(), *world.gather(os.getpid())]
        listening = intruder.listening(pids)
        did: list[str] = []
        if world.main:
            folder = Path(os.environ["MOE_TRAIN_JOB"])
            facts = {
                "folder": str(folder),
                "files": [path.name for path in folder.iterdir()],
                "pids": pids,
                "ports": [port for _, port in listening],
                "unix": intruder.unix_sockets(pids),
                "shared": intruder.shared_memory(pids),
            }
            words = [sys.executable, "-m", "tests.launch.intruder"]
            done = subprocess.run(words, input=json.dumps(facts), capture_output=True, text=True, check=True)
            did = json.loads(done.stdout)
        world.barrier()
        value = torch.tensor([float(world.rank + 1)])
        dist.all_reduce(value, group=group)
        dist.all_reduce(value, group=dist.new_group())
        diagnosis = JobChannel.of(world).diagnosis()
        return {"sums": [before, float(value)], "listening": listening, "did": did, "diagnosis": diagnosis}


def forged() -> None:
    """Sets the diagnosis and the status of rank 1 as another user of the store could, while the ranks work."""
    with joined_world(dataclasses.replace(CONFIG, timeout_minutes=0.05)) as world:
        if world.main:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            names: list[str] = []
            while not names:
                names = [name for name in store.list_keys() if name.endswith("status/1")]
            content = json.dumps(dataclasses.asdict(Failure(1, time.time(), "all is lost")))
            store.set(names[0].replace("status/1", "diagnosis"), content)
            store.set(names[0], content)
            time.sleep(1)
        print(f"the sum is {world.sum(torch.tensor([world.rank + 1])).item()}", flush=True)


def secret(own: str) -> str:
    """What a rank hears that was given this secret."""
    os.environ["MOE_TRAIN_SECRET"] = own
    try:
        check_same_secret(MessageSigner.from_environment(), World.current())
    except LaunchError as error:
        return str(error)
    finally:
        del os.environ["MOE_TRAIN_SECRET"]
    return ""
