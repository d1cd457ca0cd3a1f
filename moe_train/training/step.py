"""One optimizer update: forward and backward of its micro-batches, the engine's step, one reduction of all metrics."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moe_train.parallel.traffic import TrafficCounters, on_device
from moe_train.training.data_loader import move
from moe_train.training.engines import Engine, StepOutcome, StepResult
from moe_train.training.metrics.log_lines import Layout, MetricSums, total
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
class PendingReport:
    """The report of an update that the device may still be computing.

    Attributes:
        update: its number, counted from 1.
        lr: its learning rate.
        layout: names and shapes of the metrics.
        sizes: how many numbers are of the step, of flags, of traffic and of the metrics.
        numbers: all of them, in the host's memory.
        copied: after it the copy is complete; None: it is.
    """

    update: int
    lr: float
    layout: Layout
    sizes: tuple[int, ...]
    numbers: Tensor
    copied: torch.cuda.Event | None
    world: World

    def read(self) -> UpdateReport:
        """Waits for the device; without ``seconds``."""
        if self.copied is not None:
            self.copied.synchronize()
        step, flags, sent, values = self.numbers.split(self.sizes)
        grad_norm, applied = step.tolist()
        *not_finite, stops = flags.tolist()
        size, rank = self.world.size, self.world.rank
        ranks = tuple(number for number in range(size) if not_finite[number])
        experts = tuple(number for number in range(size) if not_finite[size + number])
        outcome = StepOutcome(grad_norm, bool(applied), rank not in ranks, rank not in experts)
        traffic = TrafficCounters.of_numbers(sent.tolist())
        return UpdateReport(MetricSums(self.layout, values), outcome, ranks or experts, stops > 0, 0.0, traffic)


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
        """:meth:`start`, and waits for the device."""
        begun = time.monotonic()
        report = self.start(update, samples, lr, signals).read()
        return dataclasses.replace(report, seconds=time.monotonic() - begun)

    def start(self, update: int, samples: list[Sample], lr: float, signals: StopSignals) -> PendingReport:
        """Computes the update that follows ``update`` finished ones.

        Args:
            samples: this rank's rows of each micro-batch.
            signals: of this process; read at the end of the update.
        """
        device = self.world.device
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
        result = self.engine.step(lr)
        sums, flags, sent = self._reduce(total(parts), result, signals.received is not None)
        counted = sums.values.where(result.applied, 0.0)  # routers adapt to applied updates only
        self.engine.module.after_update(MetricSums(sums.layout, counted).routing())
        step = torch.stack((result.grad_norm.double(), result.applied.double()))
        parts_read = (step, flags, sent, sums.values)
        numbers, copied = to_host(torch.cat(parts_read))
        sizes = tuple(map(len, parts_read))
        return PendingReport(update + 1, lr, sums.layout, sizes, numbers, copied, self.world)

    def _reduce(self, sums: MetricSums, result: StepResult, stop: bool) -> tuple[MetricSums, Tensor, Tensor]:
        """Sums metrics, flags of each rank's gradients, the stop flag and traffic over ranks.

        One all-reduce, or two where a metric is a maximum.

        Returns:
            The metrics, the flags [2 · ranks + 1] and the traffic of all ranks, on the device.
        """
        size, rank, device = self.world.size, self.world.rank, self.world.device
        flags = torch.zeros(2 * size + 1, dtype=torch.float64, device=device)
        flags[rank], flags[size + rank] = result.clean.logical_not(), result.experts_clean.logical_not()
        flags[2 * size].fill_(float(stop))
        parts = [flags, self.counters.take(device), sums.values]
        flags, sent, values = self.world.sum(torch.cat(parts)).split([len(part) for part in parts])
        return sums.with_values(values, self.world.max(sums.values) if sums.has_maxima else values), flags, sent


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory that is complete after the event; None: it is complete."""
    if not values.is_cuda:
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def seed_generators(*parts: int) -> None:
    """Seeds torch's generators (dropout) from seed, update, micro-batch and rank, so that no state must be saved."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))
