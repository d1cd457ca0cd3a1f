"""The training loop, its engines, checkpoints and logs."""

from __future__ import annotations

from moe_train.training.build import train
from moe_train.training.run.run_folder import RunFolder
from moe_train.training.runtime.world import World
from moe_train.training.trainer import RunOutcome

__all__ = ["RunFolder", "RunOutcome", "World", "train"]
