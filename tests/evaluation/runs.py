"""Run folders for tests, made without training: a real model with sharpened random weights in a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_train.config import ModelConfig, RunConfig, TaskConfig
from moe_train.data.folder import DataFolder
from moe_train.tasks import build_task
from moe_train.training.checkpoints import CheckpointStore
from moe_train.training.names import model_tensors
from moe_train.training.run_folder import RunFolder

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
    **keys: Any,
) -> Path:
    """Writes a run folder with checkpoints ``step_5`` (best) and ``step_9`` (last, other weights).

    Args:
        keys: of the routing group.
    """
    routing = {"name": strategy, **({} if strategy == "dense" else {"num_experts": 4}), **keys}
    config = RunConfig(str(data.path), seed=seed, routing=routing, model=MODEL, task=TaskConfig(directions=directions))
    run = RunFolder(folder)
    run.begin(config, data.fingerprint)
    model = build_task(config, data).build_model()
    store = CheckpointStore(run.checkpoints)
    with torch.no_grad():
        model.decoder.output.weight.mul_(6.0)
        for update, factor in ((5, 3.0), (9, 0.5)):
            model.decoder.output.weight[2].mul_(factor)
            store.save(model_tensors(model), {"update": update}, f"step_{update}")
    store.point("best", 5)
    store.point("last", 9)
    run.describe(status="finished", update=9, parameters={"total": sum(p.numel() for p in model.parameters())})
    return folder
