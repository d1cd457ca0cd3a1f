"""A rank's samples of an update, made in a background thread while the update before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_train.data.batching import Update, split_micro_batch
from moe_train.training.runtime.world import World

if TYPE_CHECKING:
    from moe_train.tasks.base import Sample, TrainingTask

Loaded = tuple[Update, "list[Sample]"]


class DataLoader:
    """Returns the samples of update u and starts making those of u + 1. The same u always gives the same samples."""

    def __init__(self, task: TrainingTask, world: World) -> None:
        self.task, self._world = task, world
        self.batches = task.train_batches()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples")
        self._ahead: tuple[int, Future[Loaded]] | None = None

    def get(self, update: int, last: bool = False) -> Loaded:
        """The plan and this rank's samples of the update after ``update`` finished ones; ``last``: nothing follows."""
        if self._ahead is None or self._ahead[0] != update:
            self._ahead = (update, self._pool.submit(self._load, update))
        loaded = self._ahead[1].result()
        self._ahead = None if last else (update + 1, self._pool.submit(self._load, update + 1))
        return loaded

    def _load(self, update: int) -> Loaded:
        plan = self.batches.update(update)
        rows = (split_micro_batch(batch, self._world.rank, self._world.size) for batch in plan.micro_batches)
        samples = [self.task.train_sample(indices, update) for indices in rows]
        if self._world.device.type == "cuda":  # a copy from pinned memory does not wait
            samples = [map_tensors(Tensor.pin_memory, sample) for sample in samples]
        return plan, samples

    def close(self) -> None:
        """Ends the background thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def move(sample: Any, device: torch.device) -> Any:
    """The sample with its tensors on ``device``."""
    return sample if device.type == "cpu" else map_tensors(lambda value: value.to(device, non_blocking=True), sample)


def map_tensors(function: Callable[[Tensor], Tensor], sample: Any) -> Any:
    """The sample with ``function`` applied to its tensors."""
    if isinstance(sample, dict):
        return {key: map_tensors(function, item) for key, item in sample.items()}
    return function(sample) if isinstance(sample, Tensor) else sample
