"""Everything that can be known to be wrong before a process is started."""

from __future__ import annotations

import torch

from moe_train.config import RunConfig
from moe_train.config.placement import place
from moe_train.data.folder import DataFolder
from moe_train.errors import ConfigError, DataError, did_you_mean
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.routing import decoder_config, routing_config
from moe_train.tasks import build_task


def check_run(config: RunConfig, data: DataFolder, plan: LayoutPlan) -> None:
    """Refuses what cannot be trained.

    Args:
        config: settled (:func:`moe_train.training.layouts.settle`).
        plan: its layout.

    Raises:
        ConfigError: routing, placement or training keys that cannot be, or that contradict each other.
        DataError: directions that the data folder has not.
    """
    check_routing(config)
    check_data(config, data)
    if config.training.checkpoint.asynchronous:
        raise ConfigError(
            "training.checkpoint.asynchronous is not there yet", remedy="leave it out; saving waits for the disk"
        )
    # Without memory for its weights the model costs nothing, and says all that it has to say about its config.
    with torch.device("meta"):
        build_task(config, data).build_model(ExpertLayout(plan))


def check_routing(config: RunConfig) -> None:
    """The strategy's own keys, and whether a decoder can use it."""
    routing = routing_config(config.routing)
    where = place(config.model.for_decoder, config.model.decoder_layers, "model.decoder_sparse_layers")
    if where.replaced or where.inserted_after:
        decoder_config(routing)


def check_data(config: RunConfig, data: DataFolder) -> None:
    """Whether the data folder has what the task asks for."""
    for direction in config.task.directions:
        if direction not in data.directions:
            remedy = did_you_mean(direction, data.directions)
            raise DataError(f"the data folder has no direction '{direction}'", str(data.path), remedy)
    wanted = config.task.directions or data.directions
    for split in ("train", "valid"):
        if not any(data.has(split, direction) for direction in wanted):
            raise DataError(
                f"the split '{split}' has no sentences for {', '.join(wanted)}",
                str(data.path),
                "give files for it and run moe-prepare again",
            )
