"""Validation losses, bit-identical for any number of ranks.

One rank computes a whole batch, as one process would (routing statistics included). With n ranks, rank r takes batches
r, r + n, …; the sums of batches are added in the order of the batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moe_train.routing.context import LocalReduction, RankReduction
from moe_train.tasks.metric_registry import reduced
from moe_train.training.data_loader import move
from moe_train.training.engines import Engine
from moe_train.training.runtime.world import World

if TYPE_CHECKING:
    from moe_train.tasks.base import TrainingTask

NamedBatch = tuple[str, Any]
Measures = Callable[[Mapping[str, float]], dict[str, Any]]


@dataclass(frozen=True)
class Validator:
    """Computes validation losses.

    Attributes:
        ranks: the group over which routers reduce in training; restored after validation.
    """

    task: TrainingTask
    criterion: nn.Module
    engine: Engine
    world: World
    ranks: RankReduction

    def run(self, before_round: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Means per target token over all sets, and ``directions``: the same for each set by name.

        Args:
            before_round: called before each round of batches, on every rank; may raise to stop the validation.
        """
        jobs = [(name, batch) for name, batches in self.task.validation_sets().items() for batch in batches]
        module = self.engine.module
        was_training, started = module.training, time.monotonic()
        module.eval()
        self.criterion.eval()
        module.set_ranks(LocalReduction())
        try:
            with torch.no_grad():
                names, table = self._metric_table(jobs, before_round)
        finally:
            module.train(was_training)
            self.criterion.train(was_training)
            module.set_ranks(self.ranks)
        line = _summary(jobs, names, self.world.sum(table).tolist(), self.task.measures)
        return line | items_per_second(self.task, line["sentences"], time.monotonic() - started)

    def _metric_table(self, jobs: list[NamedBatch], before_round: Callable[[], None]) -> tuple[list[str], torch.Tensor]:
        """Metric names, and a table in fp64 with one row per batch and one column per metric.

        Other ranks' rows are 0, so summing over ranks is exact.
        """
        rows: dict[int, dict[str, float]] = {}
        # All-to-alls need all ranks: a rank that has no batch left in a round computes an empty one.
        for first in range(0, len(jobs), self.world.size):
            before_round()
            number = first + self.world.rank
            name, batch = jobs[number] if number < len(jobs) else (jobs[0][0], np.empty(0, np.int64))
            values = self._evaluate_batch(name, batch)
            rows[number] = values
        names = sorted(rows[min(rows)]) if rows else []
        table = torch.zeros(len(jobs), len(names), dtype=torch.float64, device=self.world.device)
        for number, values in rows.items():
            if number < len(jobs):
                table[number] = torch.tensor([values[name] for name in names], dtype=torch.float64)
        return names, table

    def _evaluate_batch(self, name: str, batch: Any) -> dict[str, float]:
        sample = move(self.task.validation_sample(name, batch), self.world.device)
        with self.engine.autocast():
            _, _, logging = self.criterion(self.engine.module, sample)
        return {key: float(value) for key, value in logging.items() if key != "routing"}


def items_per_second(task: TrainingTask, items: float, seconds: float) -> dict[str, float]:
    """``<unit>_per_second`` if the task has a unit."""
    return {f"{task.unit}_per_second": items / max(seconds, 1e-9)} if task.unit else {}


def _summary(jobs: list[NamedBatch], names: list[str], table: list[list[float]], measures: Measures) -> dict[str, Any]:
    """The measures of each set by its name, and of all together; ``measures``: sums → measures."""
    by_set: dict[str, list[list[float]]] = {}
    for (name, _), row in zip(jobs, table, strict=True):
        by_set.setdefault(name, []).append(row)
    directions = {name: measures(_sums(names, rows)) for name, rows in by_set.items()}
    return {**measures(_sums(names, table)), "directions": directions}


def _sums(names: list[str], rows: list[list[float]]) -> dict[str, float]:
    return {name: reduced(name, column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
