"""One optimizer update: forward and backward of its micro-batches, the engine's step, one reduction of all metrics."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from moe_train.parallel.traffic import TrafficCounters, on_device
from moe_train.training.data_loader import move
from moe_train.training.engines import Engine, StepOutcome
from moe_train.training.metrics.log_lines import MetricSums, total
from moe_train.training.runtime.signals import StopSignals
from moe_train.training.runtime.world import World

if TYPE_CHECKING:
    from moe_train.tasks.base import Sample


@dataclass(frozen=True)
class UpdateReport:
    """Result of an update; the same on every rank, apart from ``seconds``.

    Attributes:
        sums: the criterion's sums over micro-batches and ranks, in the host's memory.
        outcome: of the engine's step.
        blocking_ranks: ranks whose own gradient was not finite; if there are none, ranks whose experts had such a
            gradient.
        stop: whether any rank has received a stop signal.
        seconds: this rank's time.
        traffic: bytes and rows that all ranks have sent for experts on other ranks.
    """

    sums: MetricSums
    outcome: StepOutcome
    blocking_ranks: tuple[int, ...]
    stop: bool
    seconds: float
    traffic: TrafficCounters = field(default_factory=TrafficCounters)


@dataclass(frozen=True)
class TrainStep:
    """Computes updates. torch's generators are seeded for every micro-batch.

    ``counters``: of this rank's all-to-alls; read and cleared at the end of each update.
    """

    engine: Engine
    criterion: nn.Module
    world: World
    seed: int
    counters: TrafficCounters = field(default_factory=TrafficCounters)

    def run(self, update: int, samples: list[Sample], lr: float, signals: StopSignals) -> UpdateReport:
        """Computes the update that follows ``update`` finished ones.

        Args:
            samples: this rank's rows of each micro-batch.
            signals: of this process; read at the end of the update.
        """
        started, device = time.monotonic(), self.world.device
        self.engine.module.set_num_updates(update)
        own = on_device([sample["ntokens"] for sample in samples], device)
        tokens = self.world.sum(own)  # target tokens of each micro-batch over all ranks
        total_tokens = tokens.sum().clamp(min=1)
        parts = []
        for number, sample in enumerate(samples):
            seed_generators(self.seed, update, number, self.world.rank)
            with self.engine.accumulate(last=number == len(samples) - 1):
                moved = move(sample, device)
                moved["world_ntokens"] = tokens[number].float()
                with self.engine.autocast():
                    loss, _, logging = self.criterion(self.engine.model, moved)
                self.engine.backward(loss / total_tokens.to(loss.dtype))
                parts.append(MetricSums.of(logging, device))
        outcome = self.engine.step(lr)
        sums, report = self._reduce(total(parts), outcome, signals.received is not None)
        if outcome.applied:
            self.engine.module.after_update(sums.routing())
        return dataclasses.replace(report, seconds=time.monotonic() - started)

    def _reduce(self, sums: MetricSums, outcome: StepOutcome, stop: bool) -> tuple[MetricSums, UpdateReport]:
        """Sums metrics, flags of each rank's gradients, the stop flag and traffic over ranks, and reads them.

        One all-reduce (two where a metric is a maximum) and one transfer to the host.

        Returns:
            The metrics of all ranks on the device, and the report, without ``seconds``.
        """
        size, device = self.world.size, self.world.device
        own = [0.0] * (2 * size) + [float(stop)]
        own[self.world.rank], own[size + self.world.rank] = float(not outcome.clean), float(not outcome.experts_clean)
        parts = [on_device(own, device), self.counters.take(device), sums.values]
        sizes = [len(part) for part in parts]
        flags, sent, values = self.world.sum(torch.cat(parts)).split(sizes)
        sums = sums.with_values(values, self.world.max(sums.values) if sums.has_maxima else values)
        flags, sent, values = torch.cat((flags, sent, sums.values)).cpu().split(sizes)  # the one host sync
        *not_finite, stops = flags.tolist()
        ranks = tuple(rank for rank in range(size) if not_finite[rank])
        experts = tuple(rank for rank in range(size) if not_finite[size + rank])
        traffic = TrafficCounters.of_numbers(sent.tolist())
        return sums, UpdateReport(MetricSums(sums.layout, values), outcome, ranks or experts, stops > 0, 0.0, traffic)


def seed_generators(*parts: int) -> None:
    """Seeds torch's generators (dropout) from seed, update, micro-batch and rank, so that no state must be saved."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))
