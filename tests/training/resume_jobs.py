"""Training runs by the real loop on ranks that live through many of them, for tests of resuming at other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from moe_train.config import RunConfig, build, to_mapping
from moe_train.data.folder import DataFolder
from moe_train.errors import TrainingError
from moe_train.parallel.gradients import is_expert
from moe_train.tasks.translation.task import TranslationTask
from moe_train.training import RunFolder, train
from moe_train.training.run.resolve_layout import plan_run, resolve_config
from moe_train.training.runtime.world import World

MODEL = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "embed_dim": 8,
    "ffn_dim": 12,
    "num_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_positions": 128,
    "sparse_layers": "all",
}
TRAINING = {
    "tokens_per_update": 160,
    "accumulation": 2,
    "log_every": 2,
    "threads": 1,
    "optimizer": {"lr": 0.01},
    "schedule": {"name": "constant", "warmup_updates": 0},
    "checkpoint": {"every_updates": 2},
    "validation": {"every_updates": 100, "max_sentences": 4},
}


class InDouble(TranslationTask):
    """fp64, so that what differs between layouts is not rounding that Adam has magnified."""

    def build_model(self, layout: Any = None) -> nn.Module:
        return super().build_model(layout).double()


class Spoilt(InDouble):
    """Rank 1's experts get a gradient that is no number; nobody else's does."""

    def build_model(self, layout: Any = None) -> nn.Module:
        model = super().build_model(layout)
        if World.current().rank == 1:
            victim = next(p for p in model.parameters() if is_expert(p))
            victim.register_hook(lambda gradient: gradient * float("nan"))
        return model


def go(
    data: str,
    folder: str,
    routing: dict[str, Any],
    layout: dict[str, Any],
    updates: int,
    make_task: type[TranslationTask] = InDouble,
    **training: Any,
) -> dict[str, Any]:
    """Begins or goes on, on every rank of the default group or alone; gives run.json."""
    mapping = {"data": data, "model": MODEL, "routing": routing, "layout": layout}
    config = build(RunConfig, {**mapping, "training": {**TRAINING, "max_updates": updates, **training}})
    world, run, opened = World.current(), RunFolder(Path(folder)), DataFolder.open(data)
    if world.main:
        plan = plan_run(config, world.size, world.local_size)
        config = resolve_config(config, plan, run.config if run.exists else None)
        run.check(config, opened.fingerprint)
        run.begin(config, opened.fingerprint)
    config = build(RunConfig, world.broadcast(to_mapping(config)))
    train(config, make_task(config, opened), run, world=world)
    return run.info


def go_from(data: str, folder: str, routing: dict[str, Any], layout: dict[str, Any], source: str) -> dict[str, Any]:
    """One update that changes next to nothing, from the weights of another run or export."""
    return go(data, folder, routing, layout, 1, init_from=source, optimizer={"name": "sgd", "lr": 1e-12})


def spoilt(data: str, folder: str, routing: dict[str, Any]) -> str:
    """What the run says that a rank's experts have spoilt."""
    try:
        go(data, folder, routing, {"expert_parallel": 2}, 2, Spoilt, nonfinite_limit=1)
    except TrainingError as error:
        return str(error)
    raise AssertionError("the gradient was taken")
