"""Engines, which reduce gradients over ranks and step the optimizer. Importing this package registers them."""

from __future__ import annotations

from moe_train.training.engines import ddp, deepspeed
from moe_train.training.engines.base import Engine, EngineInputs, StepOutcome, StepResult, build_engine, register_engine

__all__ = [
    "Engine",
    "EngineInputs",
    "StepOutcome",
    "StepResult",
    "build_engine",
    "ddp",
    "deepspeed",
    "register_engine",
]
