"""The loop: updates, log lines, validations, checkpoints, and the reasons to leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_train.config import RunConfig
from moe_train.parallel.traffic import TrafficCounters
from moe_train.training import early_stopping, nonfinite_guard
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.data_loader import DataLoader
from moe_train.training.metrics.console_logger import ConsoleLogger, validation_text
from moe_train.training.metrics.interval import MetricInterval
from moe_train.training.metrics.writers import MetricWriter
from moe_train.training.optim.lr_schedule import RunEnd, learning_rate
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.run.run_info import Account, measured_flops
from moe_train.training.runtime.signals import StopRequested, StopSignals
from moe_train.training.runtime.world import World
from moe_train.training.step import TrainStep, UpdateReport
from moe_train.training.validation import Validator, average_bleu

ValidateBleu = Callable[[nn.Module, Callable[[], None]], Mapping[str, float]]


@dataclass(frozen=True)
class RunOutcome:
    """How a run (or this session of it) ended: ``finished``, ``stopped_early`` or ``interrupted`` by a signal."""

    status: str
    update: int
    best: float | None
    best_update: int


@dataclass
class Trainer:
    """The parts of a run, put together. One object per session; :meth:`run` is called once.

    ``counters``: of this rank's exchanges; ``traffic``: what all ranks sent in the ``counted`` updates of this session;
    ``flops``: of a token's forward pass, as it was routed before the last log line; ``ends``: where the run had ended
    before it was given more updates.
    """

    config: RunConfig
    state: RunState
    folder: RunFolder
    world: World
    stepper: TrainStep
    samples: DataLoader
    validator: Validator
    checkpoints: CheckpointManager
    records: MetricWriter
    display: ConsoleLogger
    interval: MetricInterval
    counters: TrafficCounters
    validate_bleu: ValidateBleu | None = None
    account: Account | None = None
    ends: tuple[RunEnd, ...] = ()
    signals: StopSignals = field(default_factory=StopSignals)
    traffic: TrafficCounters = field(default_factory=TrafficCounters)
    counted: int = 0
    flops: float | None = None

    def run(self) -> RunOutcome:
        """Until the last update, patience, or a signal."""
        with self.signals, self.display:
            status = self._go_on()
            self._leave(status)
        return RunOutcome(status, self.state.update, self.state.best, self.state.best_update)

    def _go_on(self) -> str:
        """Updates and what follows each of them; gives the reason to leave."""
        # A signal has come between the last update and its validation: that is done first.
        left = self._validate_and_save_if_due(stop=False) if self.state.pending else ""
        while not left and self.state.update < self.config.training.max_updates:
            report = self._update()
            self.state.pending = self._validation_due()
            left = self._validate_and_save_if_due(report.stop)
        return left or "finished"

    def _validate_and_save_if_due(self, stop: bool) -> str:
        """Validates and saves where that is due; gives the reason to leave, "" where there is none.

        Who is asked to stop has no time for a validation, which may be long: it is left to the session that goes on.
        """
        improved = False
        if self.state.pending and not stop:
            try:
                improved = self._validate()
            except StopRequested:
                return "interrupted"
            self.state.pending = False
            if early_stopping.patience_spent(self.state, self.config.training.validation):
                return "stopped_early"
            stop = self._asked()
        if stop:
            return "interrupted"
        if improved or self.checkpoints.due(self.state.update):
            self._save()
        return ""

    def _asked(self) -> bool:
        """Whether any rank was asked to stop; every rank calls it."""
        own = torch.tensor(float(self.signals.asked()), device=self.world.device)
        return bool(self.world.max(own) > 0)

    def _give_way(self) -> None:
        if self._asked():
            raise StopRequested

    def close(self) -> None:
        """Ends background threads."""
        self.checkpoints.close()
        self.samples.close()
        self.records.close()

    def _update(self) -> UpdateReport:
        training, done = self.config.training, self.state.update
        self.world.pulse.mark("reading samples", done + 1)
        plan, samples = self.samples.get(done, last=done + 1 >= training.max_updates)
        lr = learning_rate(training.schedule, training.optimizer.lr, training.max_updates, done + 1, self.ends)
        self.world.pulse.mark("computing the update")
        report = self.stepper.run(done, samples, lr, self.signals.asked)
        self.state.update, self.state.epoch = done + 1, plan.epoch
        applied = report.outcome.applied
        self.interval.add(report.sums, report.outcome.grad_norm if applied else None, report.seconds, report.traffic)
        self.traffic, self.counted = self.traffic + report.traffic, self.counted + 1
        nonfinite_guard.note(self.state, applied, report.blocking_ranks, training.nonfinite_limit)
        if self.state.update % training.log_every == 0 or self.state.update == training.max_updates:
            self._log(lr)
        self.display.advance(self.state.update)
        return report

    def _log(self, lr: float) -> None:
        line = {"update": self.state.update, "epoch": self.state.epoch, **self.interval.line(), "lr": lr}
        line["skipped"] = self.state.skipped
        if flops := measured_flops(self.stepper.engine.module, self.account, line.get("pairs_per_token", {})):
            line["flops_per_token"] = self.flops = flops
        if unit := getattr(self.samples.task, "unit", None):  # one target each
            line[f"{unit}_per_second"] = line["words_per_second"]
        self.interval = MetricInterval()
        self.records.trained(line)
        self.display.trained(line)

    def _validation_due(self) -> bool:
        every, last = self.config.training.validation.every_updates, self.config.training.max_updates
        return self.state.update % every == 0 or self.state.update == last

    def _validate(self) -> bool:
        self.world.pulse.mark("validating")
        with self.counters.paused():
            return self._judged()

    def _judged(self) -> bool:
        line: dict[str, Any] = {
            "update": self.state.update,
            "epoch": self.state.epoch,
            **self.validator.run(self._give_way),
        }
        if self.validate_bleu is not None and self.config.training.validation.bleu:
            scores = dict(self.validate_bleu(self.stepper.engine.module, self._give_way))
            line |= {"bleu": average_bleu(scores), "bleu_by_direction": scores}
        improved = early_stopping.update_best(self.state, line, self.config.training.validation)
        self.records.validated(line)
        self.display.say(validation_text(line, improved))
        return improved

    def _save(self) -> None:
        self.world.pulse.mark("saving a checkpoint")
        self.state.interval = self.interval.to_json()
        self.checkpoints.save(self.state)
        if self.world.main and self.traffic.counted:
            self.folder.describe(traffic={**self.traffic.as_dict(), "updates": self.counted})

    def _leave(self, status: str) -> None:
        self._save()
        if status != "interrupted":
            self.checkpoints.average(self.state.update)
            for text in self.checkpoints.notes():
                self.display.say(f"note: {text}")
        self.checkpoints.finish()
        if self.world.main:
            self.folder.describe(
                status=status, update=self.state.update, best=self.state.best, best_update=self.state.best_update
            )
            if self.flops is not None:
                self.folder.describe(flops_per_token_measured=self.flops)
        self.display.say(_FAREWELL[status].format(update=self.state.update, folder=self.folder.path))
        self.world.barrier()


_FAREWELL = {
    "finished": "finished at update {update}: {folder}",
    "stopped_early": "stopped early at update {update}, no validation has been better for a while: {folder}",
    "interrupted": "asked to stop: saved update {update}; the same command with hydra.run.dir={folder} goes on",
}
