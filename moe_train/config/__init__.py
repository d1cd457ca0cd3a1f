"""Typed configuration: one frozen dataclass per Hydra group, validated before anything is launched."""

from __future__ import annotations

from moe_train.config.engine import EngineConfig
from moe_train.config.from_mapping import build, to_mapping
from moe_train.config.model import ModelConfig
from moe_train.config.run import (
    LaunchConfig,
    LayoutConfig,
    RunConfig,
    SearchConfig,
    TaskConfig,
)
from moe_train.config.tasks import ClassificationConfig, ImageConfig, LanguageModelConfig
from moe_train.config.training import (
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClassificationConfig",
    "EngineConfig",
    "ImageConfig",
    "LanguageModelConfig",
    "LaunchConfig",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "SearchConfig",
    "TaskConfig",
    "TrainingConfig",
    "ValidationConfig",
    "build",
    "to_mapping",
]
