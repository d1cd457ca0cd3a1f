"""Weights to start from, instead of drawn ones: another run's, sparse or dense (``training.init_from``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from moe_train.errors import CheckpointError
from moe_train.models.trainable import TrainableModel
from moe_train.training.checkpoint.dcp import load_tensors, read_tensors, shapes
from moe_train.training.checkpoint.state_dict import EXPERT, MODEL, model_tensors, whole_names
from moe_train.training.checkpoint.store import CheckpointStore, load_model
from moe_train.training.runtime.world import World


def initialise_from(model: TrainableModel, source: str, world: World | None = None) -> Path:
    """Loads weights of a finished or running run into a fresh model and returns the checkpoint's folder.

    A model with ``pretrained`` takes the tensors whose names begin so; its others stay fresh (a classifier's head).
    A dense checkpoint is upcycled into a sparse model: every expert starts as a copy of the feed-forward it replaces.

    Args:
        source: a run folder (its best checkpoint is taken), a checkpoint folder, or what moe-export wrote.

    Raises:
        CheckpointError: nothing there, damaged, or of another shape.
    """
    path = find(source, world)
    part = model.pretrained
    stored = [name for name in shapes(path) if name.startswith(MODEL + part)]
    if _has_experts(model_tensors(model)) and not _has_experts(stored):
        from moe_train.models.upcycle import upcycle

        prefix = MODEL + part
        weights = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(path, prefix).items()}
        upcycle(weights, model.get_submodule(part.removesuffix(".")))
    elif part:
        load_part(path, model, part)
    else:
        try:
            load_model(path, model)
        except CheckpointError as error:
            remedy = "give the model and routing that it was trained with, or start a sparse model from a dense run"
            raise CheckpointError(error.what, error.where, remedy) from None
    return path


def load_part(path: Path, model: nn.Module, prefix: str) -> None:
    """Loads the tensors whose names begin with ``prefix``.

    Raises:
        CheckpointError: the checkpoint has not all of them, has others there, or has them in other shapes.
    """
    wanted = {name: tensor for name, tensor in model_tensors(model).items() if name.startswith(MODEL + prefix)}
    surplus = {n for n in whole_names(shapes(path)) if n.startswith(MODEL + prefix)} - whole_names(wanted)
    if surplus:
        what = f"the checkpoint has {len(surplus)} parameters that the model has not ({min(surplus)} …)"
        raise CheckpointError(what, str(path), "give the model and routing that it was trained with")
    load_tensors(path, wanted)


def find(source: str, world: World | None = None) -> Path:
    """The verified checkpoint folder that a path means."""
    path = Path(source)
    if (path / "checkpoints").is_dir():
        return CheckpointStore(path / "checkpoints", world).resolve("best")
    if not path.is_dir():
        raise CheckpointError("there is no such run or checkpoint", source, "correct training.init_from=…")
    path = path.resolve()
    try:  # whatever its name: an export may be called `best` or `2024`
        CheckpointStore(path.parent, world).verify(path)
    except CheckpointError as error:
        remedy = "name a run folder, one of its checkpoints or an export that is whole: training.init_from=…"
        raise CheckpointError(error.what, error.where, remedy) from None
    return path


def _has_experts(names: Iterable[str]) -> bool:
    """Whether checkpoint names are of a model with experts."""
    return any(EXPERT in name for name in names)
