"""Reading checkpoints on ranks that do not all see the same, as hosts that share a folder may."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moe_train.config import CheckpointConfig, EngineConfig, TrainingConfig
from moe_train.errors import CheckpointError
from moe_train.training.checkpoint.manager import CheckpointManager
from moe_train.training.checkpoint.store import CheckpointStore
from moe_train.training.engines import EngineInputs, build_engine
from moe_train.training.runtime.world import World
from tests.training.toy import ToyModel
from tests.training.toy_run import weights


def restore(folder: str) -> tuple[int, dict[str, Tensor], list[str]]:
    """Goes on from the newest checkpoint that is whole: its update, the weights, and what was said of others."""
    world = World.current()
    engine = build_engine(EngineInputs(ToyModel(0.0), EngineConfig(), TrainingConfig(), world))
    checkpoints = CheckpointManager(CheckpointStore(folder, world), engine, CheckpointConfig(damaged="skip"), {})
    state = checkpoints.restore()
    assert state is not None
    return state.update, weights(engine.module), checkpoints.notes()


def refused(folder: str, megabytes: int) -> tuple[str, int]:
    """Writes three checkpoints, spoils the newest; what is said of it, and the bytes that this rank read for that."""
    world, store = World.current(), CheckpointStore(folder, World.current())
    for update in (1, 2, 3):
        store.save({"model.weight": torch.full((megabytes << 18,), float(update))}, {}, f"step_{update}")
    if world.main:
        victim = next(store.path(3).glob("*.safetensors"))
        with victim.open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(b"\0\0\0\0")
    world.barrier()
    before = _bytes_read()
    try:
        store.resolve("last")
    except CheckpointError as error:
        return str(error), _bytes_read() - before
    raise AssertionError("a damaged checkpoint was taken")


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
