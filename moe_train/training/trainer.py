"""The training loop: updates, log lines, validations, checkpoints, and when it ends."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_train.config import RunConfig
from moe_train.errors import TrainingError
from moe_train.parallel.traffic import TrafficCounters
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.data_loader import DataLoader
from moe_train.training.early_stopping import patience_spent, update_best
from moe_train.training.metrics.console_logger import ConsoleLogger
from moe_train.training.metrics.log_lines import MetricInterval
from moe_train.training.metrics.writers import MetricWriter
from moe_train.training.optim.lr_schedule import RunEnd, learning_rate
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.run.run_info import Account
from moe_train.training.runtime.garbage_collection import PeriodicCollection
from moe_train.training.runtime.signals import StopRequested, StopSignals
from moe_train.training.runtime.world import World
from moe_train.training.step import PendingReport, TrainStep, UpdateReport
from moe_train.training.validation import Validator

ValidateBleu = Callable[[nn.Module, Callable[[], None]], Mapping[str, float]]
_LAST_LINES = {
    "finished": "finished at update {update}: {folder}",
    "stopped_early": "stopped early at update {update}, no validation has been better for a while: {folder}",
    "interrupted": "interrupted at update {update}, checkpoint saved; run the same command with "
    "hydra.run.dir={folder} to resume",
}


@dataclass(frozen=True)
class RunOutcome:
    """How a run (or this session of it) ended: ``finished``, ``stopped_early`` or ``interrupted`` by a signal."""

    status: str
    update: int
    best: float | None
    best_update: int


@dataclass
class Trainer:
    """Trains one session of a run; :meth:`run` is called once.

    Attributes:
        interval: metrics since the last line of train.jsonl.
        counters: of this rank's all-to-alls.
        ends: where the run had ended before ``training.max_updates`` was raised.
        traffic: what all ranks have sent in the ``counted`` updates of this session.
        flops: of a token's forward pass, as routed before the last log line.
    """

    config: RunConfig
    state: RunState
    folder: RunFolder
    world: World
    train_step: TrainStep
    data_loader: DataLoader
    validator: Validator
    checkpoints: CheckpointManager
    writer: MetricWriter
    console: ConsoleLogger
    interval: MetricInterval
    counters: TrafficCounters
    validate_bleu: ValidateBleu | None = None
    account: Account | None = None
    ends: tuple[RunEnd, ...] = ()
    signals: StopSignals = field(default_factory=StopSignals)
    traffic: TrafficCounters = field(default_factory=TrafficCounters)
    counted: int = 0
    flops: float | None = None
    _unread: PendingReport | None = None
    _begun: float = 0.0
    _seconds: float = 0.0

    def run(self) -> RunOutcome:
        """Trains until the last update, until patience is spent, or until a stop signal; saves a checkpoint."""
        with self.signals, self.console, PeriodicCollection() as garbage:
            # After a signal between the last update and its validation, the validation comes first.
            status = self._validate_and_save_if_due(stop=False) if self.state.pending else ""
            while not status and self.state.update < self.config.training.max_updates:
                report = self.update()
                garbage.after_update(self.state.update)
                every, last = self.config.training.validation.every_updates, self.config.training.max_updates
                self.state.pending = self.state.update % every == 0 or self.state.update == last
                status = self._validate_and_save_if_due(report is not None and report.stop)
            status = status or "finished"
            self._finish(status)
        return RunOutcome(status, self.state.update, self.state.best, self.state.best_update)

    def close(self) -> None:
        """Ends background threads."""
        self.checkpoints.close()
        self.data_loader.close()
        self.writer.close()

    @property
    def late(self) -> bool:
        """Whether an update's report is read when the next update has been started, so that a GPU never waits."""
        return self.world.device.type == "cuda"

    def update(self) -> UpdateReport | None:
        """Computes the next update, and writes a log line if one is due.

        Returns:
            The last report that was read; None: none has been. If :attr:`late`, it is that of the update before, unless
            a log line, a validation or a checkpoint is due.
        """
        training, done = self.config.training, self.state.update
        self.world.progress.mark("reading samples", done + 1)
        plan, samples = self.data_loader.get(done, last=done + 1 >= training.max_updates)
        lr = learning_rate(training.schedule, training.optimizer.lr, training.max_updates, done + 1, self.ends)
        self.world.progress.mark("computing the update")
        self._begun = time.monotonic()
        before, self._unread = self._unread, self.train_step.start(done, samples, lr, self.signals)
        self.state.update, self.state.epoch = done + 1, plan.epoch
        report = self._read(before) if before is not None else None
        every = (training.log_every, training.validation.every_updates, training.checkpoint.every_updates)
        if not self.late or done + 1 == training.max_updates or any((done + 1) % number == 0 for number in every):
            report = self._settle() or report
        self._lap()
        self.console.advance(self.state.update)
        return report

    def _settle(self) -> UpdateReport | None:
        """Reads the report of the last update, if it has not been."""
        pending, self._unread = self._unread, None
        return self._read(pending) if pending is not None else None

    def _read(self, pending: PendingReport) -> UpdateReport:
        training, report = self.config.training, pending.read()
        self._lap()
        report, self._seconds = dataclasses.replace(report, seconds=self._seconds), 0.0
        applied = report.outcome.applied
        self.interval.add(report.sums, report.outcome.grad_norm if applied else None, report.seconds, report.traffic)
        self.traffic, self.counted = self.traffic + report.traffic, self.counted + 1
        self.state.skipped_in_row = 0 if applied else self.state.skipped_in_row + 1
        self.state.skipped += not applied
        if self.state.skipped_in_row >= training.nonfinite_limit:
            ranks = ", ".join(map(str, report.blocking_ranks)) or "none alone, only their sum"
            raise TrainingError(
                f"{training.nonfinite_limit} updates in a row had a gradient that is not finite; "
                f"the last was update {pending.update}, rank {ranks}",
                remedy="lower training.optimizer.lr or lengthen the warm-up, try training.precision=bf16 or fp32, "
                "and look for empty or broken sentences; the last checkpoint is from before",
            )
        if pending.update % training.log_every == 0 or pending.update == training.max_updates:
            self._log(pending.lr)
        return report

    def _lap(self) -> None:
        """Adds the time since the last call to that of the next report."""
        before, self._begun = self._begun, time.monotonic()
        self._seconds += self._begun - before

    def _log(self, lr: float) -> None:
        line = {"update": self.state.update, "epoch": self.state.epoch, **self.interval.line(), "lr": lr}
        line["skipped"] = self.state.skipped
        if self.account is not None and (pairs := line.get("pairs_per_token")):
            counted = self.account(self.train_step.engine.module, {int(layer): n for layer, n in pairs.items()})
            line["flops_per_token"] = self.flops = float(counted["flops_per_token"])
        if unit := self.data_loader.task.unit:  # one target each
            line[f"{unit}_per_second"] = line["words_per_second"]
        self.interval = MetricInterval()
        self.writer.trained(line)
        self.console.trained(line)

    def _validate_and_save_if_due(self, stop: bool) -> str:
        """Validates and saves if due. Returns the status that ends the session, or "".

        After a stop signal there may be no time for a validation: the next session does it.
        """
        improved = False
        if self.state.pending and not stop:
            try:
                improved = self._validate()
            except StopRequested:
                return "interrupted"
            self.state.pending = False
            if patience_spent(self.state, self.config.training.validation):
                return "stopped_early"
            stop = self._stop_requested()
        if stop:
            return "interrupted"
        if improved or self.checkpoints.due(self.state.update):
            self._save()
        return ""

    def _validate(self) -> bool:
        """Validates, writes the line of valid.jsonl, and returns whether it is the best so far."""
        self.world.progress.mark("validating")
        with self.counters.paused():
            line: dict[str, Any] = {
                "update": self.state.update,
                "epoch": self.state.epoch,
                **self.validator.run(self._raise_if_stop_requested),
            }
            if self.validate_bleu is not None and self.config.training.validation.bleu:
                scores = dict(self.validate_bleu(self.train_step.engine.module, self._raise_if_stop_requested))
                bleu = math.fsum(scores.values()) / len(scores) if scores else 0.0
                line |= {"bleu": bleu, "bleu_by_direction": scores}
            improved = update_best(self.state, line, self.config.training.validation)
            self.writer.validated(line)
            self.console.validated(line, improved)
        return improved

    def _stop_requested(self) -> bool:
        """Whether any rank has received a stop signal; a collective."""
        own = torch.tensor(float(self.signals.received is not None), device=self.world.device)
        return bool(self.world.max(own) > 0)

    def _raise_if_stop_requested(self) -> None:
        if self._stop_requested():
            raise StopRequested

    def _save(self) -> None:
        self.world.progress.mark("saving a checkpoint")
        self._begun = time.monotonic()
        self._settle()
        self.state.interval = self.interval.to_json()
        self.checkpoints.save(self.state)
        if self.world.main and self.traffic.counted:
            self.folder.describe(traffic={**self.traffic.as_dict(), "updates": self.counted})

    def _finish(self, status: str) -> None:
        """Saves the last checkpoint and writes the status to run.json."""
        self._save()
        if status != "interrupted":
            self.checkpoints.average(self.state.update)
            for text in self.checkpoints.notes():
                self.console.say(f"note: {text}")
        self.checkpoints.finish()
        if self.world.main:
            self.folder.describe(
                status=status, update=self.state.update, best=self.state.best, best_update=self.state.best_update
            )
            if self.flops is not None:
                self.folder.describe(flops_per_token_measured=self.flops)
        self.console.say(_LAST_LINES[status].format(update=self.state.update, folder=self.folder.path))
        self.world.barrier()
