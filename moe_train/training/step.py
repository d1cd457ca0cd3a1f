"""One optimizer update: micro-batches forward and backward, one reduction of what they report, one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.parallel.traffic import TrafficCounters
from moe_train.training.data_loader import move
from moe_train.training.engines import Engine, StepOutcome
from moe_train.training.hooks import tell
from moe_train.training.metrics.sums import MetricSums, total
from moe_train.training.runtime.world import World

if TYPE_CHECKING:
    from moe_train.tasks.base import Sample


@dataclass(frozen=True)
class UpdateReport:
    """What the whole world knows after an update; the same on every rank.

    Attributes:
        sums: the criterion's sums over micro-batches and ranks.
        outcome: of the engine's step.
        culprits: ranks whose own gradient was not finite; where all were, those whose experts had one.
        stop: whether any rank was asked to stop.
        seconds: this rank's time.
        traffic: what all ranks have sent for experts on other ranks.
    """

    sums: MetricSums
    outcome: StepOutcome
    blocking_ranks: tuple[int, ...]
    stop: bool
    seconds: float
    traffic: TrafficCounters = field(default_factory=TrafficCounters)


@dataclass(frozen=True)
class TrainStep:
    """Computes updates. The model's random numbers are seeded anew for every micro-batch.

    ``counters``: of this rank's exchanges, taken at the end of each update.
    """

    engine: Engine
    criterion: nn.Module
    world: World
    seed: int
    counters: TrafficCounters = field(default_factory=TrafficCounters)

    def run(self, update: int, samples: list[Sample], lr: float, stop: Callable[[], bool]) -> UpdateReport:
        """The update that follows ``update`` finished ones.

        Args:
            samples: this rank's rows of each micro-batch.
            stop: whether this rank was asked to stop; looked at when the update is done.
        """
        started = time.monotonic()
        tell(self.engine.module, "set_num_updates", update)
        tokens = self._world_tokens(samples)
        parts = []
        for number, sample in enumerate(samples):
            seed_generators(self.seed, update, number, self.world.rank)
            with self.engine.accumulate(last=number == len(samples) - 1):
                parts.append(self._micro_batch(sample, tokens[number], sum(tokens)))
        outcome = self.engine.step(lr)
        sums, blocking_ranks, stops, traffic = self._share(total(parts), outcome, stop())
        if outcome.applied:
            tell(self.engine.module, "after_update", sums.routing())
        return UpdateReport(sums, outcome, blocking_ranks, stops, time.monotonic() - started, traffic)

    def _world_tokens(self, samples: list[Sample]) -> list[float]:
        """Target tokens of each micro-batch over all ranks."""
        own = [float(sample["ntokens"]) for sample in samples]
        told: list[float] = self.world.sum(torch.tensor(own, dtype=torch.float64, device=self.world.device)).tolist()
        return told

    def _micro_batch(self, sample: Sample, tokens: float, whole: float) -> MetricSums:
        sample = move(sample, self.world.device)
        sample["world_ntokens"] = torch.tensor(tokens, device=self.world.device)
        with self.engine.autocast():
            loss, _, logging = self.criterion(self.engine.model, sample)
        self.engine.backward(loss / max(whole, 1.0))
        return MetricSums.of(logging, self.world.device)

    def _share(
        self, sums: MetricSums, outcome: StepOutcome, stop: bool
    ) -> tuple[MetricSums, tuple[int, ...], bool, TrafficCounters]:
        """World sums, whose gradient was not finite, whether anyone must stop, and traffic: in one reduction."""
        size = self.world.size
        flags = torch.zeros(2 * size + 1, dtype=torch.float64, device=self.world.device)
        flags[self.world.rank] = float(not outcome.clean)
        flags[size + self.world.rank] = float(not outcome.experts_clean)
        flags[-1] = float(stop)
        sent = torch.tensor(self.counters.take(), dtype=torch.float64, device=self.world.device)
        shared: Tensor = self.world.sum(torch.cat([flags, sent, sums.values]))
        told, sent, values = shared.split([len(flags), len(sent), len(sums.values)])
        *dirty, stops = told.tolist()
        blocking_ranks = _ranks(dirty[:size]) or _ranks(dirty[size:])
        return sums.with_values(values), blocking_ranks, stops > 0, TrafficCounters.of_numbers(sent.tolist())


def _ranks(flags: Sequence[float]) -> tuple[int, ...]:
    return tuple(rank for rank, flag in enumerate(flags) if flag)


def seed_generators(*parts: int) -> None:
    """Seeds torch's generators (dropout) from numbers that say where we are, so that no state must be kept."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))
