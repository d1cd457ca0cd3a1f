"""Checks of config and data before any process is started."""

from __future__ import annotations

import torch

from moe_train.config import RunConfig
from moe_train.config.placement import place
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.routing import decoder_config, routing_config
from moe_train.tasks import TaskData, build_task
from moe_train.training.engines.deepspeed_library import check_deepspeed
from moe_train.training.metrics.logger_registry import find_loggers


def check_run(config: RunConfig, data: TaskData, plan: LayoutPlan) -> None:
    """Refuses what cannot be trained.

    Args:
        config: resolved (:func:`moe_train.training.run.resolve_layout.resolve_config`).
        plan: its layout.

    Raises:
        ConfigError: routing, placement, engine or training keys that are impossible or contradict each other.
        DataError: data that the task cannot use, or that lacks what the config asks for.
    """
    check_routing(config)
    find_loggers(config.training.loggers)
    if config.engine.name == "deepspeed":
        check_deepspeed(config)
    build_task(config, data).check_data()
    # On the meta device the model takes no memory, and raises all its errors about the config.
    with torch.device("meta"):
        build_task(config, data).build_model(ExpertLayout(plan))


def check_routing(config: RunConfig) -> None:
    """Checks the strategy's keys, and whether the decoder can use it."""
    routing = routing_config(config.routing)
    where = place(config.model.for_decoder, config.model.decoder_layers, "model.decoder_sparse_layers")
    if where.replaced or where.inserted_after:
        decoder_config(routing)
