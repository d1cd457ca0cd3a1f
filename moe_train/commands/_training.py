"""What ``moe-train`` does with its composed config."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from moe_train.commands._app import INTERRUPTED
from moe_train.config import RunConfig, build, to_mapping
from moe_train.data.folder import DataFolder
from moe_train.launch.environment import launched_rank, under_launcher
from moe_train.launch.failures import write_failure
from moe_train.launch.joining import check_devices, joined_world, logging_to, world_size
from moe_train.launch.local import launch
from moe_train.models.accounting import account
from moe_train.tasks import build_task
from moe_train.training import Outcome, RunFolder, World, train
from moe_train.training.checkpoints import everywhere
from moe_train.training.preflight import check_run
from moe_train.training.run_folder import FAILURE

TARGET = "moe_train.commands._training:work"


def train_as_configured(mapping: Mapping[str, Any]) -> float | None:
    """Checks the whole config, then trains; gives the best value of the validation metric, for sweepers.

    What ends it otherwise is kept in the run folder, where moe-report finds it.
    """
    try:
        return _checked_and_trained(mapping)
    except Exception as error:
        if not launched_rank():
            with suppress(OSError):  # such as a full disk
                write_failure(run_directory() / FAILURE, 0, error)
        raise


def _checked_and_trained(mapping: Mapping[str, Any]) -> float | None:
    config = read_config(mapping)
    data = DataFolder.open(config.data)
    check_devices(config.launch)
    check_run(config, data, world_size(config.launch))
    if under_launcher():
        folder = None if launched_rank() else run_directory()
        outcome = joined(to_mapping(config), folder)
    else:
        outcome = on_this_host(config, data, RunFolder(run_directory()))
    if outcome.status == "interrupted" and not _in_sweep():
        sys.exit(INTERRUPTED)
    return outcome.best


def read_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The typed config; the data folder's path made absolute, so that the run can be read from anywhere."""
    config = build(RunConfig, {key: value for key, value in mapping.items() if key != "experiment"})
    return dataclasses.replace(config, data=os.path.abspath(config.data))


def run_directory() -> Path:
    """The folder that Hydra has made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def on_this_host(config: RunConfig, data: DataFolder, folder: RunFolder) -> Outcome:
    """Trains here, or in ``launch.processes`` processes; the folder is claimed for as long."""
    with folder.claimed():
        if nothing_to_do := _begin(folder, config, data):
            return nothing_to_do
        mapping, path = to_mapping(config), str(folder.path)
        if config.launch.processes == 1:
            return Outcome(**work(mapping, path))
        arguments = {"mapping": mapping, "folder": path}
        return Outcome(**launch(TARGET, arguments, config.launch, folder.logs)[0])


def work(mapping: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What each process does in a folder that is ready; every rank calls it, and gets the outcome's fields."""
    config = build(RunConfig, mapping)
    with joined_world(config.launch, config.training.threads) as world:
        return dataclasses.asdict(_train(config, DataFolder.open(config.data), RunFolder(Path(folder)), world))


def joined(mapping: Mapping[str, Any], directory: Path | None) -> Outcome:
    """The same under torchrun: rank 0's folder is everybody's.

    Args:
        directory: rank 0's run folder; None on the others.
    """
    config = build(RunConfig, mapping)
    with joined_world(config.launch, config.training.threads) as world, ExitStack() as held:
        folder = RunFolder(Path(world.broadcast(str(directory))))
        data = DataFolder.open(config.data)

        def ready() -> Outcome | None:
            if not world.main:
                return None
            held.enter_context(folder.claimed())
            return _begin(folder, config, data)

        nothing_to_do = world.broadcast(everywhere(world, ready))
        return nothing_to_do or _train(config, data, folder, world)


def _begin(folder: RunFolder, config: RunConfig, data: DataFolder) -> Outcome | None:
    """Checks the folder and readies it; gives an outcome where the run is finished and no more is wanted."""
    folder.check(config, data.fingerprint)
    if folder.exists and folder.finished and not folder.extended_by(config):
        info = folder.info
        Console().print(f"nothing to do, the run is finished: {folder.path}", highlight=False, soft_wrap=True)
        return Outcome(info["status"], info["update"], info.get("best"), info.get("best_update", 0))
    folder.begin(config, data.fingerprint)
    return None


def _train(config: RunConfig, data: DataFolder, folder: RunFolder, world: World) -> Outcome:
    task: Any = build_task(config, data)
    validate_bleu = None
    if config.training.validation.bleu:
        from moe_train.evaluation.validator import make_bleu_validator

        sentences = config.training.validation.max_sentences
        validate_bleu = make_bleu_validator(task, data, config.search, max_sentences=sentences)
    with logging_to(folder.logs, world.rank):
        return train(
            config,
            task,
            folder,
            world=world,
            validate_bleu=validate_bleu,
            account=lambda module: account(module).to_mapping(),
            console=Console(),
        )


def _in_sweep() -> bool:
    return not launched_rank() and HydraConfig.get().mode == RunMode.MULTIRUN
