"""Compares the possible layouts of a model on a cluster and chooses one (``moe-plan``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_train.analysis.planner.cost_memory import MemoryPlan, StateSharding, memory_plan
from moe_train.analysis.planner.cost_shape import ModelShape, model_shape
from moe_train.analysis.planner.cost_time import TimePlan, time_plan
from moe_train.analysis.planner.cost_traffic import StepTraffic, Workload, step_traffic
from moe_train.config.planner import PlanConfig
from moe_train.errors import ConfigError
from moe_train.parallel.layout_plan import LayoutPlan, in_words, plan_layout
from moe_train.routing import resolve, routing_config, strategy

_OPTIMIZER_BYTES = {"adam": 8, "adamw": 8, "sgd": 0}


@dataclass(frozen=True)
class Candidate:
    """One layout with its cost.

    Attributes:
        layout: its sizes.
        routing: the ``routing`` group, with numbers in place of ``rank`` and ``node``.
        same_model: whether it computes the config's model; false for a SAM model with another number of groups.
        shape, work, traffic, memory, time: parts of the estimate.
        fits: whether it fits into the memory of a rank.
    """

    layout: LayoutPlan
    routing: Mapping[str, Any]
    same_model: bool
    shape: ModelShape
    work: Workload
    traffic: StepTraffic
    memory: MemoryPlan
    time: TimePlan
    fits: bool

    @property
    def groups(self) -> int | None:
        """Number of groups of experts of the strategy (SAM); None without groups."""
        return routing_config(self.routing).expert_groups

    @property
    def tokens_per_second(self) -> float:
        """Target tokens per second of all ranks."""
        return self.work.tokens * self.work.micro_batches * self.layout.world / self.time.total


@dataclass(frozen=True)
class LayoutComparison:
    """All candidates, the fastest first, and the chosen one."""

    config: PlanConfig
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reasons: tuple[str, ...]


def compare_layouts(config: PlanConfig) -> LayoutComparison:
    """Estimates all layouts that the config allows.

    Raises:
        ConfigError: invalid values, or no possible layout.
    """
    candidates = sorted(_candidates(config), key=lambda c: c.time.total)
    same_model = [c for c in candidates if c.same_model]
    fitting = [c for c in same_model if c.fits]
    chosen = fitting[0] if fitting else min(same_model, key=lambda c: c.memory.total)
    return LayoutComparison(config, tuple(candidates), chosen, tuple(_reasons(config, candidates, chosen)))


def _candidates(config: PlanConfig) -> Iterator[Candidate]:
    shapes: dict[str, ModelShape] = {}
    for layout in possible_layouts(config):
        for routing, same in possible_routings(config.routing, layout):
            key = str(sorted((k, str(v)) for k, v in routing.items()))
            if key not in shapes:
                shapes[key] = model_shape(config.model, routing, config.vocabulary, config.images)
            yield estimate(config, layout, shapes[key], routing, same)


def possible_layouts(config: PlanConfig) -> list[LayoutPlan]:
    """The layouts that both the config and :func:`plan_layout` allow.

    Raises:
        ConfigError: a layout that the config sets is not possible.
    """
    world, per_node = config.layout.world, config.ranks_per_node
    sparse = strategy(str(config.routing.get("name", ""))).router.layer_kind != "dense"
    experts = int(config.routing.get("num_experts") or 1) if sparse else 1
    if config.batch.load is not None and len(config.batch.load) != experts:
        raise ConfigError(
            f"batch.load has {len(config.batch.load)} numbers for {experts} experts", remedy="set one number per expert"
        )
    first = plan_layout(world, per_node, 1, experts)
    sizes = first.working_sizes(experts)
    if config.layout.expert_parallel != "auto":
        sizes = (config.layout.expert_parallel,)
    levels = (False, True) if config.layout.two_level == "auto" else (config.layout.two_level,)
    plans = [plan_layout(world, per_node, size, experts, level) for size in sizes for level in levels]
    return [p for p in plans if config.layout.two_level != "auto" or p.dispatches_by_node == p.two_level]


def possible_routings(routing: Mapping[str, Any], layout: LayoutPlan) -> list[tuple[dict[str, Any], bool]]:
    """The resolved ``routing`` group, and variants with as many groups as ranks or nodes; True for the same model."""
    ranks, nodes = layout.expert_parallel, layout.nodes_per_group
    own = resolve(routing, ranks=ranks, nodes=nodes)
    found: list[tuple[dict[str, Any], bool]] = [(own, True)]
    for key in strategy(str(routing.get("name", ""))).config.layout_keys:
        for number in (ranks, nodes):
            other = {**own, key: number}
            if all(other != known for known, _ in found) and _is_valid(other):
                found.append((other, False))
    if not _is_valid(own) and routing != own:  # as many groups as ranks, which is not possible for this number
        return []
    return found


def _is_valid(routing: Mapping[str, Any]) -> bool:
    try:
        routing_config(routing)
    except ConfigError:
        return False
    return True


def estimate(
    config: PlanConfig, layout: LayoutPlan, shape: ModelShape, routing: Mapping[str, Any], same_model: bool = True
) -> Candidate:
    """Estimates the cost of one layout."""
    work = workload(config, shape.sentence_tokens)
    sharding = StateSharding(
        config.engine.name,
        config.engine.zero_stage,
        config.engine.offload_optimizer,
        _OPTIMIZER_BYTES[config.training.optimizer],
    )
    traffic = step_traffic(shape, layout, work)
    memory = memory_plan(shape, layout, work, traffic, sharding)
    time = time_plan(shape, layout, work, traffic, config.cluster, sharding, config.training.overlap)
    fits = memory.total <= config.cluster.memory_gb * 1e9
    return Candidate(layout, routing, same_model, shape, work, traffic, memory, time, fits)


def workload(config: PlanConfig, sentence_tokens: int | None = None) -> Workload:
    """The work of one rank in a step; ``sentence_tokens``: fixed by the model, where it is."""
    return Workload(
        tokens=config.tokens_per_rank,
        source_ratio=config.batch.source_ratio,
        sentence_tokens=sentence_tokens or config.batch.sentence_tokens,
        micro_batches=config.training.accumulation,
        precision=config.training.precision,
        recompute=config.training.recompute,
        load=config.batch.load,
        skew=config.batch.skew,
        device=config.cluster.device,
    )


def _reasons(config: PlanConfig, candidates: list[Candidate], chosen: Candidate) -> Iterator[str]:
    """Yields the reasons for the choice."""
    limit = config.cluster.memory_gb
    if not chosen.fits:
        yield (
            f"no layout fits into {limit:g} GB per rank; this one needs the least, {chosen.memory.total / 1e9:.1f} GB."
            " Try training.recompute=true, a smaller training.tokens_per_update, or engine=deepspeed"
            " engine.zero_stage=1"
        )
    else:
        tried = sum(c.same_model for c in candidates)
        yield (
            f"the fastest of {tried} layouts that compute this model, within {limit:g} GB per rank"
            f" ({chosen.memory.total / 1e9:.1f} GB)"
        )
    parts = {f.name: getattr(chosen.time, f.name) for f in dataclasses.fields(chosen.time)}
    largest = max(parts, key=lambda name: parts[name])
    yield f"{largest.replace('_', ' ')} is the largest part of its step, {parts[largest] / chosen.time.total:.0%}"
    rivals = [c for c in candidates if c.same_model and c is not chosen]
    if rivals:
        yield _next_best(chosen, next((c for c in rivals if c.fits), rivals[0]))
    warning = routing_config(chosen.routing).layout_warning(chosen.layout)
    if warning and chosen.layout.expert_parallel > 1:
        yield warning
    other = next((c for c in candidates if not c.same_model and c.fits), None)
    if other is not None and other.time.total < 0.99 * chosen.time.total:
        less = 1 - other.time.total / chosen.time.total
        keys = ", ".join(f"routing.{key}={other.routing[key]}" for key in routing_config(other.routing).layout_keys)
        model = f"another model, with {keys} ({describe_layout(other.layout)})"
        yield f"{model}, would take {less:.0%} less time"


def _next_best(chosen: Candidate, rival: Candidate) -> str:
    """The next best layout, and the part of the step in which it is slower."""
    more = {f.name: getattr(rival.time, f.name) - getattr(chosen.time, f.name) for f in dataclasses.fields(chosen.time)}
    worst = max(more, key=lambda name: more[name])
    slower = rival.time.total / chosen.time.total - 1
    fit = "" if rival.fits else ", and does not fit"
    part = worst.replace("_", " ")
    return f"next best: {describe_layout(rival.layout)}, {slower:+.0%} time, most of it in {part}{fit}"


def describe_layout(layout: LayoutPlan) -> str:
    """Such as ``8 replicas x 8 expert-parallel, two-level``."""
    levels = ", two-level" if layout.dispatches_by_node else ""
    return f"{in_words(layout.replicas, layout.expert_parallel)}{levels}"
