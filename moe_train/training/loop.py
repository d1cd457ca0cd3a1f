"""The loop: updates, log lines, validations, checkpoints, and the reasons to leave."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch import nn

from moe_train.config import RunConfig
from moe_train.errors import TrainingError
from moe_train.parallel.counters import TrafficCounters
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.ranks import ProcessRanks
from moe_train.routing.context import Alone, Ranks
from moe_train.training import best, guard
from moe_train.training.about import Account, describe_run, measured_flops, summary
from moe_train.training.background import world_aside
from moe_train.training.checkpoints import CheckpointStore
from moe_train.training.engines import Engine, EngineInputs, build_engine
from moe_train.training.hooks import tell
from moe_train.training.initial import initialise_from
from moe_train.training.journal import Interval
from moe_train.training.keeper import Keeper
from moe_train.training.layouts import build_layout, layout_warnings, pictures
from moe_train.training.progress import Display, validation_text
from moe_train.training.records import Records
from moe_train.training.run_folder import RunFolder, config_digest
from moe_train.training.samples import SampleLoader
from moe_train.training.schedules import learning_rate
from moe_train.training.signals import StopSignals
from moe_train.training.state import RunState
from moe_train.training.steps import Stepper, UpdateReport
from moe_train.training.validation import Validator, average_bleu
from moe_train.training.world import World

if TYPE_CHECKING:
    from moe_train.tasks.base import TrainingTask

ValidateBleu = Callable[[nn.Module], Mapping[str, float]]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Outcome:
    """How a run (or this session of it) ended: ``finished``, ``stopped_early`` or ``interrupted`` by a signal."""

    status: str
    update: int
    best: float | None
    best_update: int


def train(
    config: RunConfig,
    task: TrainingTask,
    folder: RunFolder,
    *,
    world: World | None = None,
    validate_bleu: ValidateBleu | None = None,
    account: Account | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains, or goes on training, in ``folder``. Every rank calls it.

    Args:
        config: checked before (:meth:`RunFolder.check`, :mod:`moe_train.training.preflight`).
        task: batches, model and criterion.
        world: None: the default process group, on the CPU.
        validate_bleu: scores per direction; every rank calls it at the same updates.
        account: what run.json says of the model's size and cost.
        console: rank 0's screen; None: silence.

    Raises:
        TrainingError: too many updates without a finite gradient, or a full disk.
        CheckpointError: a checkpoint that cannot be written, or that is damaged where the run should go on from it.
    """
    world = world or World.current()
    world.pulse.run = folder.path
    parts = _Parts(config, task, folder, world, validate_bleu, account, console if world.main else None)
    loop = _assemble(parts)
    try:
        return loop.run()
    except OSError as error:
        if error.errno in _FULL:
            raise TrainingError(
                f"the disk is full ({error.strerror})", str(folder.path), "make room and start the same command again"
            ) from error
        raise
    finally:
        loop.close()


@dataclass(frozen=True)
class _Parts:
    """The arguments of :func:`train`."""

    config: RunConfig
    task: TrainingTask
    folder: RunFolder
    world: World
    validate_bleu: ValidateBleu | None
    account: Account | None
    screen: Console | None


def _assemble(given: _Parts) -> Loop:
    config, task, folder, world = given.config, given.task, given.folder, given.world
    ranks: Ranks = ProcessRanks(dist.new_group()) if world.size > 1 else Alone()
    layout = build_layout(config, world)
    engine = _engine(given, ranks, layout)
    criterion = task.build_criterion().to(world.device)
    about = {
        "config_digest": config_digest(config),
        "world": world.size,
        "expert_parallel": layout.plan.expert_parallel,
    }
    keeping = config.training.checkpoint
    store = CheckpointStore(folder.checkpoints, world_aside(world) if keeping.asynchronous else world)
    keeper = Keeper(store, engine, keeping, about)
    state = keeper.restore() or RunState()
    samples = SampleLoader(task, world)
    if world.main:
        describe_run(folder, config, engine.module, world, state.update, given.account, layout.plan)
    if given.screen is not None:
        for text in keeper.aside:
            given.screen.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)
        given.screen.print(summary(folder, config, state, samples.batches))
        _say_layout(given, layout)
    return Loop(
        config=config,
        state=state,
        folder=folder,
        world=world,
        stepper=Stepper(engine, criterion, world, config.seed, layout.counters),
        samples=samples,
        validator=Validator(task, criterion, engine, world, ranks),
        keeper=keeper,
        records=Records(folder, world.main, state.update),
        display=Display(config.training.max_updates, state.update, given.screen),
        interval=Interval.from_json(state.interval, world.device),
        counters=layout.counters,
        validate_bleu=given.validate_bleu,
        account=given.account,
    )


def _say_layout(given: _Parts, layout: ExpertLayout) -> None:
    assert given.screen is not None
    for text in pictures(given.config, layout.plan):
        given.screen.print(text, highlight=False, markup=False)
    for text in layout_warnings(given.config, layout.plan):
        given.screen.print(f"[yellow]note:[/] {escape(text)}", highlight=False)


def _engine(given: _Parts, ranks: Ranks, layout: ExpertLayout) -> Engine:
    """The model, told who shares its batches, inside its engine.

    The ranks of the routers have a communicator of their own: their reductions never interleave with the engine's.
    """
    config, folder, world = given.config, given.folder, given.world
    module = given.task.build_model(layout).to(world.device).train()
    tell(module, "set_recompute", config.training.recompute)
    tell(module, "set_ranks", ranks)
    latest = world.broadcast(CheckpointStore(folder.checkpoints, world).latest())
    if config.training.init_from is not None and latest is None:
        initialise_from(module, config.training.init_from, world)
    return build_engine(EngineInputs(module, config.engine, config.training, world, layout))


@dataclass
class Loop:
    """The parts of a run, put together. One object per session; :meth:`run` is called once.

    ``counters``: of this rank's exchanges; ``traffic``: what all ranks sent in the ``counted`` updates of this session;
    ``flops``: of a token's forward pass, as it was routed before the last log line.
    """

    config: RunConfig
    state: RunState
    folder: RunFolder
    world: World
    stepper: Stepper
    samples: SampleLoader
    validator: Validator
    keeper: Keeper
    records: Records
    display: Display
    interval: Interval
    counters: TrafficCounters
    validate_bleu: ValidateBleu | None = None
    account: Account | None = None
    traffic: TrafficCounters = field(default_factory=TrafficCounters)
    counted: int = 0
    flops: float | None = None

    def run(self) -> Outcome:
        """Until the last update, patience, or a signal."""
        status = "finished"
        with StopSignals() as signals, self.display:
            while self.state.update < self.config.training.max_updates:
                report = self._update(stop=signals.received is not None)
                validated = self._validation_due()
                improved = self._validate() if validated else False
                if validated and best.patience_spent(self.state, self.config.training.validation):
                    status = "stopped_early"
                    break
                if report.stop:
                    status = "interrupted"
                    break
                if improved or self.keeper.due(self.state.update):
                    self._save()
            self._leave(status)
        return Outcome(status, self.state.update, self.state.best, self.state.best_update)

    def close(self) -> None:
        """Ends background threads."""
        self.keeper.close()
        self.samples.close()
        self.records.close()

    def _update(self, stop: bool) -> UpdateReport:
        training, done = self.config.training, self.state.update
        self.world.pulse.mark("reading samples", done + 1)
        plan, samples = self.samples.get(done, last=done + 1 >= training.max_updates)
        lr = learning_rate(training.schedule, training.optimizer.lr, training.max_updates, done + 1)
        self.world.pulse.mark("computing the update")
        report = self.stepper.run(done, samples, lr, stop)
        self.state.update, self.state.epoch = done + 1, plan.epoch
        applied = report.outcome.applied
        self.interval.add(report.sums, report.outcome.grad_norm if applied else None, report.seconds, report.traffic)
        self.traffic, self.counted = self.traffic + report.traffic, self.counted + 1
        guard.note(self.state, applied, report.culprits, training.nonfinite_limit)
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
        self.interval = Interval()
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
        line: dict[str, Any] = {"update": self.state.update, "epoch": self.state.epoch, **self.validator.run()}
        if self.validate_bleu is not None and self.config.training.validation.bleu:
            scores = dict(self.validate_bleu(self.stepper.engine.module))
            line |= {"bleu": average_bleu(scores), "bleu_by_direction": scores}
        improved = best.judge(self.state, line, self.config.training.validation)
        self.records.validated(line)
        self.display.say(validation_text(line, improved))
        return improved

    def _save(self) -> None:
        self.world.pulse.mark("saving a checkpoint")
        self.state.interval = self.interval.to_json()
        self.keeper.save(self.state)
        if self.world.main and self.traffic.counted:
            self.folder.describe(traffic={**self.traffic.as_dict(), "updates": self.counted})

    def _leave(self, status: str) -> None:
        self._save()
        if status != "interrupted":
            self.keeper.average(self.state.update)
        self.keeper.finish()
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
