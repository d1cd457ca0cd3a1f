"""A run from its config: its parts are made, put together, and let go."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from moe_train.config import RunConfig
from moe_train.errors import TrainingError
from moe_train.models.routed import block_names
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.peer_check import check_peers
from moe_train.parallel.reducers import DistReduction
from moe_train.routing.context import LocalReduction, RankReduction
from moe_train.training.checkpoint.async_writer import world_for_checkpoints
from moe_train.training.checkpoint.init_from import initialise_from
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.store import CheckpointStore, reading_state
from moe_train.training.data_loader import DataLoader
from moe_train.training.engines import Engine, EngineInputs, build_engine
from moe_train.training.hooks import tell
from moe_train.training.metrics.console_logger import ConsoleLogger
from moe_train.training.metrics.interval import MetricInterval
from moe_train.training.metrics.writers import MetricWriter
from moe_train.training.optim.schedule_extension import run_ends
from moe_train.training.run.heartbeat import heartbeat
from moe_train.training.run.resolve_layout import build_layout, layout_warnings, pictures
from moe_train.training.run.run_folder import ALIVE, RunFolder, config_digest
from moe_train.training.run.run_info import Account, describe_run, summary
from moe_train.training.runtime.world import World
from moe_train.training.step import TrainStep
from moe_train.training.trainer import RunOutcome, Trainer, ValidateBleu
from moe_train.training.validation import Validator

if TYPE_CHECKING:
    from moe_train.tasks.base import TrainingTask

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(
    config: RunConfig,
    task: TrainingTask,
    folder: RunFolder,
    *,
    world: World | None = None,
    validate_bleu: ValidateBleu | None = None,
    account: Account | None = None,
    console: Console | None = None,
    data: Mapping[str, Any] | None = None,
) -> RunOutcome:
    """Trains, or goes on training, in ``folder``. Every rank calls it.

    Args:
        config: checked before (:meth:`RunFolder.check`, :mod:`moe_train.training.preflight`).
        task: batches, model and criterion.
        world: None: the default process group, on the CPU.
        validate_bleu: scores per direction; every rank calls it at the same updates. It is handed what it should call
            now and then, on every rank alike: that raises :class:`StopRequested`.
        account: what run.json says of the model's size and cost.
        console: rank 0's screen; None: silence.
        data: what run.json says of the data (:class:`moe_train.training.run.run_data.RunData`).

    Raises:
        TrainingError: too many updates without a finite gradient, or a full disk.
        CheckpointError: a checkpoint that cannot be written, or that is damaged where the run should go on from it.
    """
    world = world or World.current()
    world.pulse.run = folder.path
    parts = _Parts(config, task, folder, world, validate_bleu, account, console if world.main else None, data)
    with heartbeat(folder.path / ALIVE) if world.main else nullcontext():
        return _run(parts)


def _run(parts: _Parts) -> RunOutcome:
    loop = _assemble(parts)
    try:
        return loop.run()
    except OSError as error:
        if error.errno in _FULL:
            raise TrainingError(
                f"the disk is full ({error.strerror})",
                str(parts.folder.path),
                "make room and start the same command again",
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
    data: Mapping[str, Any] | None


def _assemble(given: _Parts) -> Trainer:
    config, task, folder, world = given.config, given.task, given.folder, given.world
    ranks: RankReduction = DistReduction(dist.new_group()) if world.size > 1 else LocalReduction()
    layout = build_layout(config, world)
    engine = _engine(given, ranks, layout)
    criterion = task.build_criterion().to(world.device)
    about = {
        "config_digest": config_digest(config),
        "world": world.size,
        "expert_parallel": layout.plan.expert_parallel,
    }
    keeping = config.training.checkpoint
    store = CheckpointStore(folder.checkpoints, world_for_checkpoints(world) if keeping.asynchronous else world)
    if world.size > 1:
        check_peers()  # of the engine's groups and the one for checkpoints
    checkpoints = CheckpointManager(store, engine, keeping, about)
    state = checkpoints.restore() or RunState()
    with reading_state(store.path(state.update)):
        interval = MetricInterval.from_json(state.interval, world.device)
    samples = DataLoader(task, world)
    if world.main:
        describe_run(folder, config, engine.module, world, state.update, given.account, layout.plan, given.data)
    notes = checkpoints.notes()
    if given.screen is not None:
        for text in notes:
            given.screen.print(f"[yellow]note:[/] {escape(text)}", highlight=False, markup=True, soft_wrap=True)
        given.screen.print(summary(folder, config, state, samples.batches))
        _say_layout(given, layout)
    return Trainer(
        config=config,
        state=state,
        folder=folder,
        world=world,
        stepper=TrainStep(engine, criterion, world, config.seed, layout.counters),
        samples=samples,
        validator=Validator(task, criterion, engine, world, ranks),
        checkpoints=checkpoints,
        records=MetricWriter(folder, config, world.main, state.update, state.pending),
        display=ConsoleLogger(config.training.max_updates, state.update, given.screen, block_names(engine.module)),
        interval=interval,
        counters=layout.counters,
        validate_bleu=given.validate_bleu,
        account=given.account,
        ends=run_ends(world.broadcast(folder.info if world.main else {})),
    )


def _say_layout(given: _Parts, layout: ExpertLayout) -> None:
    assert given.screen is not None
    for text in pictures(given.config, layout.plan):
        given.screen.print(text, highlight=False, markup=False)
    for text in layout_warnings(given.config, layout.plan):
        given.screen.print(f"[yellow]note:[/] {escape(text)}", highlight=False, markup=True)


def _engine(given: _Parts, ranks: RankReduction, layout: ExpertLayout) -> Engine:
    """The model, told who shares its batches, inside its engine.

    The ranks of the routers have a communicator of their own: their reductions never interleave with the engine's.
    """
    config, folder, world = given.config, given.folder, given.world
    module = given.task.build_model(layout).to(world.device).train()
    tell(module, "set_recompute", config.training.recompute)
    tell(module, "set_ranks", ranks)
    store = CheckpointStore(folder.checkpoints, world)
    if config.training.init_from is not None and not store.broadcast_from_rank0(store.updates):
        initialise_from(module, config.training.init_from, world)
    return build_engine(EngineInputs(module, config.engine, config.training, world, layout))
