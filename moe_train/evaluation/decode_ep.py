"""Decoding on the ranks of a process group, whose experts may be divided over them.

Ranks that hold each other's experts search in step: one that has finished its batch, or has none left, joins with zero
rows until all are done. Jobs are dealt out in their order, which is by length, so that those of a round take about as
long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from moe_train.config import LayoutConfig, RunConfig, SearchConfig
from moe_train.errors import ConfigError
from moe_train.evaluation.loading import OpenedRun
from moe_train.evaluation.translator import Job, JobResult, Translator
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.reducers import DistReduction
from moe_train.routing.context import RankReduction
from moe_train.training.run.resolve_layout import plan_run
from moe_train.training.runtime.world import World


def plan_evaluation(config: RunConfig, expert_parallel: int, processes: int, ranks_per_node: int = 0) -> LayoutPlan:
    """The layout of an evaluation, which need not be that of the training.

    Raises:
        ConfigError: it cannot be; the message says what would work.
    """
    layout = LayoutConfig("expert_parallel", expert_parallel)
    try:
        return plan_run(dataclasses.replace(config, layout=layout), processes, ranks_per_node or processes)
    except ConfigError as error:
        what, remedy = (
            text.replace("layout.expert_parallel", "expert_parallel") for text in (error.what, error.remedy)
        )
        raise ConfigError(what, error.where, remedy) from None


def decode_in_step(
    run: OpenedRun, jobs: Sequence[Job], search: SearchConfig, plan: LayoutPlan, device: torch.device
) -> Iterator[tuple[int, JobResult]]:
    """This rank's jobs, as they are done: their numbers and outcomes. Every rank of the default group iterates it."""
    world, layout = World.current(device), ExpertLayout.build(plan, device.type)
    model = run.load(device, layout).model
    translator = Translator(run.task, model, search, device, _company(layout))
    for first in range(0, len(jobs), world.size):
        number = first + world.rank
        if number < len(jobs):
            yield number, translator.run(jobs[number])
        else:
            translator.run(Job(jobs[0].source, jobs[0].target, (), ()))


def _company(layout: ExpertLayout) -> RankReduction | None:
    """The ranks that experts are divided over."""
    return DistReduction(layout.expert_groups[0]) if layout.plan.expert_parallel > 1 else None
