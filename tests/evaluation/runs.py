"""Run folders for tests, made without training: a real model with sharpened random weights in a real checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_train.config import ModelConfig, RunConfig, TaskConfig
from moe_train.data.folder import DataFolder
from moe_train.tasks import build_task
from moe_train.training.checkpoint.state_dict import model_tensors
from moe_train.training.checkpoint.store import CheckpointStore
from moe_train.training.run.run_data import RunData
from moe_train.training.run.run_folder import RunFolder

MODEL = ModelConfig(
    encoder_layers=2,
    decoder_layers=2,
    embed_dim=32,
    ffn_dim=48,
    num_heads=2,
    max_positions=40,
    sparse_layers="all",
    share_embeddings=False,
)


def make_run(
    folder: Path,
    data: DataFolder,
    strategy: str = "switch",
    seed: int = 1,
    directions: tuple[str, ...] = (),
    model: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Writes a run folder with checkpoints ``step_5`` (best) and ``step_9`` (last, other weights).

    Args:
        model: changes to :data:`MODEL`.
        keys: of the routing group.
    """
    routing = {"name": strategy, **({} if strategy == "dense" else {"num_experts": 4}), **keys}
    shape = dataclasses.replace(MODEL, **model or {})
    config = RunConfig(str(data.path), seed=seed, routing=routing, model=shape, task=TaskConfig(directions=directions))
    return make_task_run(folder, config, data)


def make_task_run(folder: Path, config: RunConfig, data: Any) -> Path:
    """The same for any task, on data that is opened."""
    run = RunFolder(folder)
    run.begin(config, data.fingerprint)
    task = build_task(config, data)
    built = task.build_model()
    store = CheckpointStore(run.checkpoints)
    sharpened = built.decoder.output_weight if config.task.translates else next(built.parameters())
    with torch.no_grad():
        sharpened.mul_(6.0)
        for update, factor in ((5, 3.0), (9, 0.5)):
            sharpened[2].mul_(factor)
            store.save(model_tensors(built), {"update": update}, f"step_{update}")
    store.point("best", 5)
    store.point("last", 9)
    parameters = {"total": sum(p.numel() for p in built.parameters())}
    run.describe(status="finished", update=9, parameters=parameters, **RunData.of_task(task).to_json())
    return folder
