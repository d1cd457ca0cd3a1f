"""Opens a trained run for inference: config, data, task and the weights of one checkpoint."""

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
from moe_train.errors import CheckpointError, ConfigError, DataError, LaunchError, first_line, located
from moe_train.models.fixed_experts import fix_experts
from moe_train.models.routed import RoutedModel
from moe_train.parallel.layout import ExpertLayout
from moe_train.routing.inference_overrides import changed, check_draw_seed, evaluation_values
from moe_train.tasks import build_task, open_data
from moe_train.tasks.base import TrainingTask, TranslatingTask
from moe_train.training.checkpoint.dcp import shapes
from moe_train.training.checkpoint.store import CheckpointStore, check_model, load_model
from moe_train.training.run.run_data import RunData, check_input_files, note_changed_folder, verify_data
from moe_train.training.run.run_folder import CONFIG, RunFolder
from moe_train.training.run.run_folder import EXPORTED_DATA as DATA
from moe_train.training.runtime.world import World

VARIANTS = "variants"  # results with routing keys that differ from the training's


@dataclass(frozen=True)
class OpenedRun:
    """A run without its weights, with which work for other processes can be prepared.

    Attributes:
        folder: the run folder.
        config: that of the training, with the present data folder and the changed routing keys.
        checkpoint: the folder of the verified checkpoint.
        inference: every routing key that may change after training, and the seed of draws.
        trained: the directions or languages that it was trained on; all of the task's where that is not known.
    """

    folder: RunFolder
    config: RunConfig
    data: Any
    task: TrainingTask
    checkpoint: Path
    inference: Inference
    trained: tuple[str, ...]

    @property
    def variant(self) -> str:
        """Subfolder for scores and outputs where routing differs from the training's; "" where it does not."""
        trained, here = _inference(self.folder.config), self.inference
        changed = [f"{key}={value}" for key, value in here.routing.items() if value != trained.routing[key]]
        if here.draw_seed != trained.draw_seed:
            changed.append(f"draw_seed={here.draw_seed}")
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(changed))
        return f"{VARIANTS}/{name}" if name else ""

    @property
    def translating_task(self) -> TranslatingTask:
        """The task as one that translates.

        Raises:
            ConfigError: its model does not write text.
        """
        if not isinstance(self.task, TranslatingTask):
            raise ConfigError(
                f"the task '{self.config.task.name}' does not translate",
                str(self.folder.path),
                "measure it with moe-evaluate",
            )
        return self.task

    @property
    def results(self) -> Path:
        """Folder of scores and outputs: the run folder, or the :attr:`variant` in it."""
        return self.folder.path / self.variant

    def load(self, device: torch.device | str = "cpu", layout: ExpertLayout | None = None) -> LoadedRun:
        """Builds the model on ``device`` and loads the checkpoint's weights.

        Args:
            layout: distribution of experts over ranks, independent of that of the training; None: all on this rank.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        model = self.task.build_model(layout)
        load_model(self.checkpoint, model)
        if self.inference.draw_seed is not None:
            model.set_seed(self.inference.draw_seed)
        if isinstance(model, RoutedModel):
            fix_experts(model)
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
        path: the run folder, or an export (which has one checkpoint; ``checkpoint`` is ignored).
        checkpoint: ``best``, ``last``, ``averaged``, or an update's number; or the folder of a checkpoint that the
            process that started this one has verified, with the data.
        data: the data folder, where it has moved.
        inference: routing keys that differ from the training's.
        world: ranks that all open it and share the reading of checksums; None: only this process.
        verify: when data files are compared with their checksums; sentences that only training reads are not.

    Raises:
        ConfigError: no run folder, a routing key that cannot change after training, or a seed of draws for routing
            without draws.
        CheckpointError: the checkpoint is missing or damaged.
        DataError: the data folder is missing or damaged, or its vocabulary differs from the run's.
    """
    folder = RunFolder.open(path)
    config, is_verified = folder.config, isinstance(checkpoint, Path)
    is_export = not folder.checkpoints.is_dir() and any(folder.path.glob("model*.safetensors"))
    if is_export:
        if not isinstance(checkpoint, Path):
            checkpoint = folder.path.resolve()
            CheckpointStore(checkpoint.parent, world).verify(checkpoint)
        config = dataclasses.replace(config, data=str(checkpoint / DATA) if config.data == DATA else config.data)
    if data is not None:
        config = dataclasses.replace(config, data=str(data))
    elif Path(config.data).is_absolute() and not Path(config.data).is_dir():
        raise DataError(
            "the data folder of the training does not exist", config.data, "set its present place: data=FOLDER"
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
    if not is_verified:
        main = world is None or world.main
        verify_data(opened, task, verify, world, training=False)
        known = RunData.of_run(folder, (opened, task), keep=main)
        known.check_vocabulary(task, folder.path)  # before the sizes, which differ for that reason
        _check_size(config, opened, checkpoint, folder)
        if data is None or opened.fingerprint == folder.content["data_fingerprint"]:
            check_input_files(folder, opened, verify, keep=False)
        if data is None:
            note_changed_folder(folder, opened, main)
        trained = known.trained
    trained = trained or task.directions
    return OpenedRun(folder, config, opened, task, checkpoint, _inference(config, inference.draw_seed), trained)


def _check_size(config: RunConfig, data: Any, checkpoint: Path, folder: RunFolder) -> None:
    """Checks that the config fits the checkpoint, before memory is allocated for the weights.

    Raises:
        CheckpointError, ConfigError: it does not; names the config file.
    """
    with located(str(folder.path / CONFIG)):
        layers = config.model.encoder_layers + config.model.decoder_layers
        if layers > (tensors := len(shapes(checkpoint))):
            raise CheckpointError(f"the model has {layers:,} layers, and the checkpoint {tensors:,} tensors")
        try:
            with torch.device("meta"):
                model = build_task(config, data).build_model()
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)[:200]
            raise CheckpointError(f"no model can be built from it ({reason})") from error
        check_model(checkpoint, model)


def _inference(config: RunConfig, draw_seed: int | None = None) -> Inference:
    """Every routing key that may change after training, from the config, and the seed; None: the run's."""
    return Inference(evaluation_values(config.routing), config.seed if draw_seed is None else draw_seed)


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
    """The device of the ``index``-th process of this host: a GPU where there is one and it is wanted.

    Raises:
        LaunchError: ``cuda`` is wanted and there is no GPU.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise LaunchError("no GPU can be used", remedy="set the device to cpu or auto")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", index % torch.cuda.device_count())
