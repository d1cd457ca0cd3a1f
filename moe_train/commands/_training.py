"""Runs a training from the composed config of ``moe-train``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.markup import escape

from moe_train.commands._scoring import check_scoring, score_when_finished
from moe_train.commands.cli.app import print_error_once
from moe_train.commands.cli.hydra_job import in_sweep, overrides, run_directory
from moe_train.config import RunConfig, build, to_mapping
from moe_train.errors import UserError
from moe_train.launch.elastic import restarted
from moe_train.launch.job.devices import check_devices
from moe_train.launch.job.env import launched_rank, under_launcher
from moe_train.launch.job.failures import WorkerError, failure_of, out_of_memory, write_failure
from moe_train.launch.local import launch
from moe_train.launch.process_group import joined_world, logging_to, ranks_per_node, world_size
from moe_train.launch.requeue import exit_saved
from moe_train.launch.slurm import is_array_job
from moe_train.models.accounting import account
from moe_train.screen import Screen
from moe_train.tasks import TaskData, build_task, locate_data, open_data
from moe_train.training import RunFolder, RunOutcome, World, train
from moe_train.training.checkpoint.store import CheckpointStore, run_on_all_ranks
from moe_train.training.preflight import check_run
from moe_train.training.run.resolve_layout import plan_run, resolve_config
from moe_train.training.run.run_data import RunData, check_initial_vocabulary, check_input_files, verify_data
from moe_train.training.run.run_folder import FAILURE
from moe_train.training.run.session_notes import session_notes

TARGET = "moe_train.commands._training:work"


def train_as_configured(mapping: Mapping[str, Any]) -> float | None:
    """Checks the whole config, then trains; returns the best value of the validation metric, for sweepers.

    A failure is written to failure.json in the run folder, which moe-report reads. A start that is refused writes
    nothing: an existing run is not changed, and a folder without a run does not become one. Failures of jobs of a sweep
    or of a Slurm array are always written, so that a report on the sweep contains all of them.
    """
    folder = None if launched_rank() else RunFolder(run_directory())
    before = folder.session if folder else None
    try:
        return _check_and_train(mapping, folder)
    except Exception as error:
        refused = (
            folder and isinstance(error, UserError) and folder.session == before
        )  # before this session did anything
        if folder and (not refused or ((in_sweep() or is_array_job()) and not folder.exists)):
            with suppress(OSError):  # such as a full disk
                write_failure(folder.path / FAILURE, 0, error, overrides())
        if out_of_memory(error):  # so that the remedy is shown last, not the traceback
            raise WorkerError(failure_of(launched_rank(), error), None) from None
        raise


def _check_and_train(mapping: Mapping[str, Any], folder: RunFolder | None) -> float | None:
    with print_error_once():
        config = read_config(mapping)
        check_devices(config.launch)
        check_scoring(config)
        config, data = checked(config, folder)
    try:
        if under_launcher() or folder is None:
            outcome = joined(to_mapping(config), folder)
        else:
            outcome = on_this_host(config, data, folder)
            score_when_finished(config, folder, World())
    except SystemExit as error:  # interrupted before there was anything to save
        print("interrupted before the first update: nothing to save", file=sys.stderr)
        exit_saved(int(error.code or 0))
        raise
    if outcome.status == "interrupted":
        exit_saved()
    return outcome.best


def read_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The typed config, with the absolute path of the data folder, so that the run can be read from any directory."""
    config = build(RunConfig, {key: value for key, value in mapping.items() if key != "experiment"})
    return dataclasses.replace(config, data=locate_data(config))


def checked(config: RunConfig, folder: RunFolder | None) -> tuple[RunConfig, TaskData]:
    """Checks config and data; returns the config with the layout's numbers resolved, and the data.

    Args:
        folder: the run folder, whose resolved numbers (SAM's groups) are kept; None on ranks other than 0.

    Raises:
        UserError: the layout is not possible, or :func:`moe_train.training.preflight.check_run` raises.
    """
    data = open_data(config)
    plan = plan_run(config, world_size(config.launch), ranks_per_node(config.launch))
    before = folder.config if folder is not None and folder.exists else None
    resolved = resolve_config(config, plan, before)
    task = build_task(resolved, data)
    if not under_launcher():  # ranks of a launcher share this work after the rendezvous
        verify_data(data, task, config.data_verify)
    if folder is not None or resolved.routing == config.routing:
        check_run(resolved, data, plan)
    source = config.training.init_from
    if source is not None and folder is not None and not CheckpointStore(folder.checkpoints).updates():
        check_initial_vocabulary(source, task)
    return resolved, data


def on_this_host(config: RunConfig, data: TaskData, folder: RunFolder) -> RunOutcome:
    """Trains in this process, or in ``launch.processes`` new ones; the run folder is locked meanwhile."""
    with folder.claimed(), _removed_if_refused(folder):
        if nothing_to_do := _begin(folder, config, data):
            return nothing_to_do
        mapping, path = to_mapping(config), str(folder.path)
        if config.launch.processes == 1 and config.engine.name != "deepspeed":  # which needs a process group
            return RunOutcome(**work(mapping, path))
        arguments = {"mapping": mapping, "folder": path}
        return RunOutcome(**launch(TARGET, arguments, config.launch, folder.logs)[0])


def work(mapping: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Trains in a prepared folder; every rank calls it. Returns the fields of :class:`RunOutcome`."""
    config = build(RunConfig, mapping)
    with joined_world(config.launch, config.training.threads) as world:
        return dataclasses.asdict(_train(config, open_data(config), RunFolder(Path(folder)), world))


def joined(mapping: Mapping[str, Any], own: RunFolder | None) -> RunOutcome:
    """Trains under torchrun or srun: all ranks use the run folder and the resolved numbers of rank 0.

    Args:
        own: the run folder on rank 0; None on the others.
    """
    config = build(RunConfig, mapping)
    with joined_world(config.launch, config.training.threads) as world, ExitStack() as held:
        folder = RunFolder(Path(world.broadcast(str(own.path) if own else "")))
        config = dataclasses.replace(config, routing=world.broadcast(dict(config.routing)))
        data = open_data(config)
        verify_data(data, build_task(config, data), config.data_verify, world)

        def ready() -> dict[str, Any] | None:
            if not world.main:
                return None
            held.enter_context(folder.claimed())
            held.enter_context(_removed_if_refused(folder))
            resumes = restarted() and folder.exists  # also if finished: a rank may have been lost after the last update
            done = _begin(folder, dataclasses.replace(config, resume="must") if resumes else config, data)
            return dataclasses.asdict(done) if done else None

        nothing_to_do = world.broadcast(run_on_all_ranks(world, ready))
        outcome = RunOutcome(**nothing_to_do) if nothing_to_do else _train(config, data, folder, world)
        score_when_finished(config, folder, world)
        return outcome


@contextmanager
def _removed_if_refused(folder: RunFolder) -> Iterator[None]:
    """Removes the files of a new run that ends before its first update by a user error or an interrupt."""
    unused = folder.unused
    try:
        yield
    except (UserError, SystemExit, KeyboardInterrupt):
        if unused and not folder.info and not in_sweep():
            folder.forget_start()
        raise


def _begin(folder: RunFolder, config: RunConfig, data: TaskData) -> RunOutcome | None:
    """Checks and prepares the folder; returns an outcome where the run is finished and there is nothing to do."""
    folder.check(config, data.fingerprint)
    if folder.exists and folder.finished and not folder.extended_by(config):
        info = folder.info
        Screen().print(f"nothing to do, the run is finished: {folder.path}", highlight=False, soft_wrap=True)
        return RunOutcome(info["status"], info["update"], info.get("best"), info.get("best_update", 0))
    if folder.info:
        RunData.of_run(folder, (data, task := build_task(config, data))).check_vocabulary(task, folder.path)
    check_input_files(folder, data, config.data_verify, keep=True)
    for text in session_notes(folder, config):
        Screen().print(f"[yellow]note:[/] {escape(text)}", highlight=False, markup=True, soft_wrap=True)
    folder.begin(config, data.fingerprint, overrides())
    return None


def _train(config: RunConfig, data: Any, folder: RunFolder, world: World) -> RunOutcome:
    task: Any = build_task(config, data)
    validate_bleu = None
    with logging_to(folder.logs, world.rank):
        if config.training.validation.bleu:
            from moe_train.evaluation.bleu_validation import make_bleu_validator

            sentences = config.training.validation.max_sentences
            validate_bleu = make_bleu_validator(task, data, config.search, max_sentences=sentences)
        return train(
            config,
            task,
            folder,
            world=world,
            validate_bleu=validate_bleu,
            account=lambda module, pairs_per_token: account(module, pairs_per_token).to_mapping(),
            console=Screen(),
            data=RunData.of_task(task).to_json() if world.main else None,
        )
