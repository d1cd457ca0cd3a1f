"""Runs one job at a time in a thread: writing a checkpoint while the training loop computes updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.training.runtime.world import ProgressMarker, World


class BackgroundJob:
    """A thread that runs jobs one after the other. The next :meth:`wait` raises what a job has raised."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._job: Future[Any] | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Begins a job when the one before it is done.

        Raises:
            Exception: what that one raised; the new job is not begun then.
        """
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Waits until no job is running.

        Raises:
            Exception: what the job raised, once.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits and ends the thread. An error of the job is dropped: another error is being raised already."""
        with suppress(Exception):
            self.wait()
        if self._thread is not None:
            self._thread.shutdown()


def world_for_checkpoints(world: World) -> World:
    """The same processes with a gloo group of their own, for collectives of a thread that runs during the loop's.

    Every rank calls it.
    """
    world = replace(world, device=torch.device("cpu"), progress=ProgressMarker())
    if world.size == 1:
        return world
    return replace(world, group=dist.new_group(backend="gloo"))


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which the next update does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
