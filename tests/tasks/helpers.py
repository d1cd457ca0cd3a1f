"""Small configs for the tests of tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_train.config import ModelConfig, RunConfig, TaskConfig, TrainingConfig
from moe_train.data.folder import DataFolder
from moe_train.tasks.translation.task import TranslationTask

TINY = ModelConfig(
    encoder_layers=2,
    decoder_layers=2,
    embed_dim=16,
    ffn_dim=32,
    num_heads=2,
    dropout=0.0,
    attention_dropout=0.0,
    max_positions=128,
)


def make_task(
    folder: DataFolder, task: TaskConfig | None = None, routing: dict[str, Any] | None = None, **training: Any
) -> TranslationTask:
    """A task on a folder with a tiny model."""
    config = RunConfig(
        data=str(folder.path),
        model=TINY,
        routing=routing or {"name": "switch", "num_experts": 4},
        task=task or TaskConfig(),
        training=dataclasses.replace(TrainingConfig(tokens_per_update=1024), **training),
    )
    return TranslationTask(config, folder)


def in_double(task: TranslationTask) -> torch.nn.Module:
    """The task's model in fp64, for equalities."""
    return task.build_model().double()
