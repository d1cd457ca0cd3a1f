"""A layer on the ranks of a world, for tests of what strategies keep when their experts are divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_train.layers import BatchInfo, MoELayer, RoutingSettings, batch_context
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout

SENTENCES, LENGTH, DIM = 32, 16, 6


@dataclass(frozen=True)
class ExpertPlacement:
    """``load`` [E]: this rank's pairs for each expert; ``rows``: what it has carried out for all ranks; ``expert``:
    uid → [2, LENGTH] experts of a sentence's tokens in both passes."""

    load: torch.Tensor
    rows: int
    expert: dict[int, torch.Tensor]


def two_passes(routing: dict[str, Any], rank: int | None = None, update: int = 3) -> ExpertPlacement:
    """A doubled batch of this rank's sentences; those of ``rank`` of four, where no group is there."""
    layout = ExpertLayout.local()
    if rank is None:
        world, rank = dist.get_world_size(), dist.get_rank()
        layout = ExpertLayout.build(plan_layout(world, world, world, int(routing["num_experts"])))
    layer = MoELayer(DIM, 8, routing, layout=layout).train()
    uid = torch.arange(SENTENCES) + SENTENCES * rank
    info = BatchInfo(uid.repeat(2), pass_index=torch.arange(2).repeat_interleave(SENTENCES))
    context = batch_context(None, (2 * SENTENCES, LENGTH), RoutingSettings(update=update), info, training=True)
    _, record = layer.block(torch.randn(2 * SENTENCES, LENGTH, DIM), context)
    expert = record.routing[0].choices.view(2, SENTENCES, LENGTH)
    rows = sum(traffic.returned_rows for traffic in layout.counters.by_link.values())
    return ExpertPlacement(record.statistics.load, rows, {int(u): expert[:, i] for i, u in enumerate(uid)})
