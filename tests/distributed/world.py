"""Runs one function on N gloo ranks: real processes that live through many calls, so that many tests share a launch."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 240.0
MOST_THREADS = 40  # of a rank


class World:
    """N processes in one gloo group.

    ``world.run(function, *arguments)`` calls it on every rank and returns what each gave back, rank by rank. The
    function must be importable (pytest's test files are not: keep it in a module beside them), arguments and results
    picklable. An exception on any rank is raised here with its traceback, a rank that hangs fails the call after
    ``TIMEOUT`` seconds; either ends the world.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.alive = True
        # A server that has imported what ranks need makes each cheap to start; a bare fork would inherit our threads.
        context = multiprocessing.get_context("forkserver")
        needed = ["torch.distributed.device_mesh", "torch.distributed.checkpoint", "moe_train.commands._training"]
        context.set_forkserver_preload([*needed, "torch._dynamo"])  # which the first step of an optimizer imports
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs, sys.path), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls ``function(*arguments)`` on all ranks at once."""
        return self.run_each(function, [arguments] * self.size)

    def run_each(self, function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Calls ``function(*arguments[rank])`` on all ranks at once."""
        importlib.import_module(function.__module__)  # a rank could not say that it cannot import it
        try:
            for pipe, own in zip(self._pipes, arguments, strict=True):
                pipe.send((function, own))
            return self._answers()
        except BaseException:  # a test's timeout among them: an answer that came later would pass for the next one's
            self.close()
            raise

    def _answers(self) -> list[Any]:
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer in {TIMEOUT:.0f} s; errors: {errors}")
            done, value = pipe.recv()
            results.append(value)
            if not done:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def usable(self) -> bool:
        """Whether all ranks live and none has collected threads.

        gloo's threads of a group that a DDP or DeepSpeed engine has used outlive the group, and each wakes up 700 times
        a second: with the 1,700 that a whole run left, everything else took three times as long.
        """
        return self.alive and all(
            process.is_alive() and len(os.listdir(f"/proc/{process.pid}/task")) <= MOST_THREADS
            for process in self._processes
        )

    def close(self) -> None:
        """Ends the processes."""
        self.alive = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class Worlds:
    """Worlds by size, each started when it is first wanted and again where it has ended."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        """A living world of that size."""
        if size in self._worlds and not self._worlds[size].usable():
            self._worlds.pop(size).close()
        if size not in self._worlds:
            self._worlds[size] = World(size)
        return self._worlds[size]

    def close(self) -> None:
        """Ends them all."""
        for world in self._worlds.values():
            world.close()


def _serve(rank: int, size: int, port: int, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:  # until the tests' process closes its end
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        try:
            _leave_groups()
        except Exception:
            traceback.print_exc()
            return  # a rank that cannot tidy up does not serve the next test


def _leave_groups() -> None:
    """Ends the groups that a call has made: each of them keeps threads that wake up many times a second."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    # DeepSpeed remembers its groups for the life of a process, unless it ends them itself.
    deepspeed = sys.modules.get("deepspeed.comm")
    ends = deepspeed if deepspeed is not None and deepspeed.is_initialized() else dist
    for group in list(_world.pg_map):
        if group is not dist.group.WORLD:
            ends.destroy_process_group(group)


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
