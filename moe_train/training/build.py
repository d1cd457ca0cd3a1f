"""Builds the parts of a run from its config, and trains."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from moe_train.config import RunConfig
from moe_train.data.batching import PLAN_VERSION
from moe_train.errors import TrainingError
from moe_train.kernels.device_kernels import select_kernels
from moe_train.models.routed import block_names
from moe_train.models.trainable import TrainableModel
from moe_train.parallel.peer_check import check_peers
from moe_train.parallel.reducers import DistReduction
from moe_train.routing.context import LocalReduction, RankReduction
from moe_train.training.checkpoint.background_job import world_for_checkpoints
from moe_train.training.checkpoint.init_from import initialise_from
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.run_state import RunState
from moe_train.training.checkpoint.store import CheckpointStore, reading_state
from moe_train.training.data_loader import DataLoader
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.metrics.console_logger import ConsoleLogger
from moe_train.training.metrics.log_lines import MetricInterval
from moe_train.training.metrics.writers import MetricWriter
from moe_train.training.optim.schedule_extension import run_ends
from moe_train.training.packed_rows import packed_attention
from moe_train.training.preflight import check_compiler, check_kernels
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
    """Begins or resumes the run in ``folder``. Every rank calls it.

    Args:
        config: checked before (:meth:`RunFolder.check`, :mod:`moe_train.training.preflight`).
        task: batches, model and criterion.
        world: None: the default process group, on the CPU.
        validate_bleu: returns scores per direction; every rank calls it at the same updates. Its second argument is
            a function that it calls between batches, on every rank alike, and that raises :class:`StopRequested`.
        account: size and cost of the model, for run.json.
        console: of rank 0; None: no output.
        data: description of the data for run.json (:class:`moe_train.training.run.run_data.RunData`).

    Raises:
        TrainingError: too many updates without a finite gradient, or a full disk.
        CheckpointError: a checkpoint that cannot be written, or a damaged one where the run should resume.
    """
    world = world or World.current()
    world.progress.run = folder.path
    with heartbeat(folder.path / ALIVE) if world.main else nullcontext():
        trainer = build_trainer(config, task, folder, world, validate_bleu, account, console, data)
        try:
            return trainer.run()
        except OSError as error:
            if error.errno in _FULL:
                raise TrainingError(
                    f"the disk is full ({error.strerror})",
                    str(folder.path),
                    "make room and start the same command again",
                ) from error
            raise
        finally:
            trainer.close()


def build_trainer(
    config: RunConfig,
    task: TrainingTask,
    folder: RunFolder,
    world: World,
    validate_bleu: ValidateBleu | None = None,
    account: Account | None = None,
    console: Console | None = None,
    data: Mapping[str, Any] | None = None,
) -> Trainer:
    """The trainer of a session, restored from the run's last checkpoint if it has one; arguments as of :func:`train`.

    The reductions of routers have a process group of their own, so that they never interleave with the engine's.
    """
    ranks: RankReduction = DistReduction(dist.new_group()) if world.size > 1 else LocalReduction()
    layout = build_layout(config, world)
    module = task.build_model(layout).to(world.device).train()
    if not isinstance(module, TrainableModel):
        base = f"{TrainableModel.__module__}.{TrainableModel.__qualname__}"
        raise TypeError(
            f"{type(task).__name__}.build_model must return a {base}, and returns a {type(module).__name__}"
        )
    module.set_recompute(config.training.recompute)
    check_kernels(config.kernels, gpus=int(world.device.type == "cuda"))
    module.set_kernels(select_kernels(config.kernels, world.device))
    if config.training.compile == "router":
        check_compiler(gpus=int(world.device.type == "cuda"))
        module.compile_routing()
    module.set_packed(packed_attention(config, world.device))
    module.set_ranks(ranks)
    first_store = CheckpointStore(folder.checkpoints, world)
    if config.training.init_from is not None and not first_store.broadcast_from_rank0(first_store.updates):
        initialise_from(module, config.training.init_from, world)
    engine = build_engine(EngineInputs(module, config.engine, config.training, world, layout))
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
    state = checkpoints.restore() or RunState(plan_version=PLAN_VERSION)
    if state.plan_version > PLAN_VERSION:
        raise TrainingError(
            f"the run's batches are planned in version {state.plan_version}, and this moe_train has {PLAN_VERSION}",
            str(folder.path),
            "resume it with the moe_train that began it, or a newer one",
        )
    task.plan_version = state.plan_version
    with reading_state(store.path(state.update)):
        interval = MetricInterval.from_json(state.interval)
    data_loader = DataLoader(task, world)
    if world.main:
        about_run = {**(data or {}), "plan_version": state.plan_version}
        describe_run(folder, config, engine.module, world, state.update, account, layout.plan, about_run)
    notes = checkpoints.notes()
    console = console if world.main else None
    if console is not None:
        for text in notes:
            console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, markup=True, soft_wrap=True)
        console.print(summary(folder, config, state, data_loader.batches))
        for text in pictures(config, layout.plan):
            console.print(text, highlight=False, markup=False)
        for text in layout_warnings(config, layout.plan):
            console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, markup=True)
    return Trainer(
        config=config,
        state=state,
        folder=folder,
        world=world,
        train_step=TrainStep(engine, criterion, world, config.seed, layout.counters),
        data_loader=data_loader,
        validator=Validator(task, criterion, engine, world, ranks),
        checkpoints=checkpoints,
        writer=MetricWriter(folder, config, world.main, state.update, state.pending),
        console=ConsoleLogger(config.training.max_updates, state.update, console, block_names(engine.module)),
        interval=interval,
        counters=layout.counters,
        validate_bleu=validate_bleu,
        account=account,
        ends=run_ends(world.broadcast(folder.info if world.main else {})),
    )
