"""A trained run, loaded for use: config, data, task and the weights of one checkpoint, on any number of devices."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.config import RunConfig
from moe_train.config.evaluation import Inference
from moe_train.config.run import DataVerify
from moe_train.errors import CheckpointError, DataError, LaunchError, located
from moe_train.parallel.layout import ExpertLayout
from moe_train.routing.inference_overrides import changed, check_draw_seed, evaluation_values
from moe_train.tasks import build_task, open_data
from moe_train.training.checkpoint.dcp import shapes
from moe_train.training.checkpoint.store import CheckpointStore, check_model, load_model
from moe_train.training.run.run_data import RunData, check_input_files, note_changed_folder, verify_data
from moe_train.training.run.run_folder import CONFIG, RunFolder
from moe_train.training.run.run_folder import EXPORTED_DATA as DATA
from moe_train.training.runtime.world import World

VARIANTS = "variants"  # results of a run that routes otherwise than it was told to


@dataclass(frozen=True)
class OpenedRun:
    """A run without its weights: enough to prepare work that other processes do.

    Attributes:
        folder: the run folder.
        config: as the run was trained, with the data folder's present place and the routing keys changed since.
        checkpoint: the verified checkpoint's folder.
        inference: how it routes: every key that may change after training, and the seed of draws.
        trained: the directions or languages that it was trained on; all of the task's where that cannot be told.
    """

    folder: RunFolder
    config: RunConfig
    data: Any
    task: Any
    checkpoint: Path
    inference: Inference
    trained: tuple[str, ...]

    @property
    def variant(self) -> str:
        """The folder in the run folder for scores and outputs of what routes otherwise than the run; "" where nothing
        does."""
        trained, here = _inference(self.folder.config), self.inference
        changed = [f"{key}={value}" for key, value in here.routing.items() if value != trained.routing[key]]
        if here.draw_seed != trained.draw_seed:
            changed.append(f"draw_seed={here.draw_seed}")
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(changed))
        return f"{VARIANTS}/{name}" if name else ""

    @property
    def results(self) -> Path:
        """Where scores and outputs belong: the run folder, or the :attr:`variant` in it."""
        return self.folder.path / self.variant

    def load(self, device: torch.device | str = "cpu", layout: ExpertLayout | None = None) -> LoadedRun:
        """Builds the model on ``device`` and loads the checkpoint's weights.

        Args:
            layout: which rank holds which experts, whatever the layout of the training was; None: all here.

        Raises:
            CheckpointError: the weights are another model's.
        """
        model = self.task.build_model(layout)
        load_model(self.checkpoint, model)
        model.set_seed(self.inference.draw_seed)
        model.to(device).eval()
        return LoadedRun(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, model=model)


@dataclass(frozen=True)
class LoadedRun(OpenedRun):
    """A run with its model, in eval mode."""

    model: Any


def open_run(
    path: Path | str,
    checkpoint: str | int | Path = "best",
    data: Path | str | None = None,
    inference: Inference | None = None,
    world: World | None = None,
    verify: DataVerify = "once",
) -> OpenedRun:
    """Opens a run without loading its weights.

    Args:
        path: the run folder, or what moe-export made of one (which has one checkpoint, whatever is asked for).
        checkpoint: ``best``, ``last``, ``averaged``, or an update's number; or the folder of a checkpoint that has been
            verified before, with the data, by the process that hands out the work.
        data: the data folder, where it has moved.
        inference: how it routes, where not as the run has it.
        world: ranks that all open it and share the reading of checksums; None: this process alone.
        verify: whether files of the data are compared with their checksums; sentences that only training reads are not.

    Raises:
        ConfigError: no run folder, a routing key that cannot change after training, or a seed of draws where none are.
        CheckpointError: no such checkpoint, or a damaged one.
        DataError: the data folder is missing or damaged, or its vocabulary is not the run's.
    """
    folder = RunFolder.open(path)
    config, handed_out = folder.config, isinstance(checkpoint, Path)
    if _is_export(folder):
        if not isinstance(checkpoint, Path):
            checkpoint = folder.path.resolve()
            CheckpointStore(checkpoint.parent, world).verify(checkpoint)
        config = dataclasses.replace(config, data=str(checkpoint / DATA) if config.data == DATA else config.data)
    if data is not None:
        config = dataclasses.replace(config, data=str(data))
    elif Path(config.data).is_absolute() and not Path(config.data).is_dir():
        raise DataError(
            "the data folder that the run was trained on is not there", config.data, "say where it is now: data=FOLDER"
        )
    inference = inference or Inference()
    config = dataclasses.replace(config, routing=changed(config.routing, inference.routing))
    if inference.draw_seed not in (None, config.seed):
        check_draw_seed(config.routing, inference.draw_seed)
    opened = open_data(config)
    if not isinstance(checkpoint, Path):
        checkpoint = CheckpointStore(folder.checkpoints, world).resolve(checkpoint)
    task = build_task(config, opened)
    trained: tuple[str, ...] | None = None
    if not handed_out:
        main = world is None or world.main
        verify_data(opened, task, verify, world, training=False)
        _check_size(config, opened, checkpoint, folder)
        known = RunData.of_run(folder, (opened, task), keep=main)
        known.check_vocabulary(task, folder.path)
        if data is None:
            check_input_files(folder, opened, verify, keep=False)
            note_changed_folder(folder, opened, main)
        trained = known.trained
    trained = trained or task.directions
    return OpenedRun(folder, config, opened, task, checkpoint, _inference(config, inference.draw_seed), trained)


def _check_size(config: RunConfig, data: Any, checkpoint: Path, folder: RunFolder) -> None:
    """Refuses a config of another model than the checkpoint's before any memory is taken for its weights.

    Raises:
        CheckpointError, ConfigError: the config's file is named.
    """
    with located(str(folder.path / CONFIG)):
        layers = config.model.encoder_layers + config.model.decoder_layers
        if layers > (tensors := len(shapes(checkpoint))):
            raise CheckpointError(f"the model has {layers:,} layers, and the checkpoint {tensors:,} tensors")
        try:
            with torch.device("meta"):
                model = build_task(config, data).build_model()
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise CheckpointError(f"no model can be built from it ({reason})") from error
        check_model(checkpoint, model)


def _inference(config: RunConfig, draw_seed: int | None = None) -> Inference:
    """Every key that may change after training as the config has it, and the seed; None: the run's."""
    return Inference(evaluation_values(config.routing), config.seed if draw_seed is None else draw_seed)


def _is_export(folder: RunFolder) -> bool:
    """Whether this is no run folder but what moe-export made of one: a checkpoint with its config."""
    return not folder.checkpoints.is_dir() and any(folder.path.glob("model*.safetensors"))


def load_run(
    path: Path | str,
    checkpoint: str | int = "best",
    data: Path | str | None = None,
    device: torch.device | str = "cpu",
    inference: Inference | None = None,
    verify: DataVerify = "once",
) -> LoadedRun:
    """Opens a run and loads its weights; arguments and errors as :func:`open_run` and :meth:`OpenedRun.load`."""
    return open_run(path, checkpoint, data, inference, verify=verify).load(device)


def choose_device(wanted: str, index: int = 0) -> torch.device:
    """The device of the ``index``-th process of this host: a GPU of its own where there is one and it is wanted.

    Raises:
        LaunchError: ``cuda`` is wanted and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise LaunchError("no GPU can be used", remedy="set the device to cpu or auto")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", index % torch.cuda.device_count())
