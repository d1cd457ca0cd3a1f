"""Decodes on the ranks of a process group, over which the experts may be divided.

Ranks that hold each other's experts search at the same time, step by step: a rank that has finished its batch, or has
none left, takes part with zero rows until all are done. Batches are assigned in their order, which is by length, so
that those of a round take about as long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from moe_train.config import LayoutConfig, RunConfig, SearchConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.loading import OpenedRun
from moe_train.evaluation.translations import Batch, BatchResult
from moe_train.evaluation.translator import Translator
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.reducers import DistReduction
from moe_train.training.run.resolve_layout import plan_run
from moe_train.training.runtime.world import World


def plan_evaluation(config: RunConfig, expert_parallel: int, processes: int, ranks_per_node: int = 0) -> LayoutPlan:
    """The layout of an evaluation, which may differ from that of the training.

    Raises:
        ConfigError: the layout is not possible; the message says which are.
    """
    layout = LayoutConfig("expert_parallel", expert_parallel)
    try:
        return plan_run(dataclasses.replace(config, layout=layout), processes, ranks_per_node or processes)
    except ConfigError as error:
        what, remedy = (
            text.replace("layout.expert_parallel", "expert_parallel") for text in (error.what, error.remedy)
        )
        raise ConfigError(what, error.where, remedy) from None


def decode_on_rank(
    run: OpenedRun, batches: Sequence[Batch], search: SearchConfig, plan: LayoutPlan, device: torch.device
) -> Iterator[tuple[int, BatchResult]]:
    """Yields (index, result) of this rank's batches. Every rank of the default group must iterate it to the end."""
    world, layout = World.current(device), ExpertLayout.build(plan, device.type)
    model = run.load(device, layout).model
    group = DistReduction(layout.expert_groups[0]) if layout.plan.expert_parallel > 1 else None
    translator = Translator(run.translating_task, model, search, device, group)
    for first in range(0, len(batches), world.size):
        number = first + world.rank
        if number < len(batches):
            yield number, translator.run(batches[number])
        else:
            none = None if batches[0].targets is None else ()
            translator.run(Batch(batches[0].source, batches[0].target, (), (), targets=none))
