"""The training loop, its engines, checkpoints and logs."""

from __future__ import annotations

from moe_train.training.loop import Outcome
from moe_train.training.run_folder import RunFolder
from moe_train.training.start import train
from moe_train.training.world import World

__all__ = ["Outcome", "RunFolder", "World", "train"]
