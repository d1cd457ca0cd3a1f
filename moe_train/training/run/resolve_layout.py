"""From config to layout: planned before processes start, fixed at the first launch, built on each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_train.config import LayoutConfig, RunConfig
from moe_train.config.placement import place
from moe_train.errors import ConfigError
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import LayoutPlan, plan_layout
from moe_train.routing import RoutingConfig, decoder_config, resolve, routing_config, strategy
from moe_train.training.runtime.world import World

_WORDS = ("rank", "node")


def plan_run(config: RunConfig, processes: int, ranks_per_node: int) -> LayoutPlan:
    """The layout of a config in a world.

    Args:
        processes: ranks in all.
        ranks_per_node: ranks on each host, if ``layout.ranks_per_node`` is 0.

    Raises:
        ConfigError: it is impossible; the message says what would work.
    """
    layout, counts = config.layout, [routing.num_experts for routing in sparse_routings(config)]
    per_node = layout.ranks_per_node or ranks_per_node
    size = layout.expert_parallel or _widest(layout, LayoutPlan(processes, 1, min(per_node, processes)), counts)
    try:
        plan = plan_layout(processes, per_node, size, counts, layout.two_level)
    except ConfigError as error:
        if size <= processes or any(count % size for count in counts):
            raise
        more = f", or start {size} processes (launch.processes={size}, or by torchrun)"
        raise ConfigError(error.what, error.where, error.remedy + more) from None
    if layout.name == "node" and plan.nodes_per_group > 1:
        inside = _widest(layout, plan, counts)
        raise ConfigError(
            f"layout=node keeps expert groups inside a node of {plan.ranks_per_node} ranks, and"
            f" layout.expert_parallel={size} does not fit",
            remedy=f"set layout.expert_parallel to {inside} or less, or choose layout=two_level",
        )
    return plan


def _widest(layout: LayoutConfig, plan: LayoutPlan, counts: list[int]) -> int:
    """The largest number of ranks that the experts of every layer can be divided over."""
    limit = plan.ranks_per_node if layout.name == "node" else plan.world
    sizes = [set(plan.working_sizes(count)) for count in counts]
    return max((n for n in set.intersection(*sizes) if n <= limit), default=1) if sizes else 1


def sparse_routings(config: RunConfig) -> list[RoutingConfig]:
    """The strategies' own configs of the stacks that have sparse layers: encoder, decoder; none for a dense model."""
    model, encoder = config.model, routing_config(config.routing)
    found = []
    if _any(model.sparse_layers, model.encoder_layers, "model.sparse_layers"):
        found.append(encoder)
    if _any(model.for_decoder, model.decoder_layers, "model.decoder_sparse_layers"):
        found.append(decoder_config(encoder))
    return [routing for routing in found if strategy(routing.name).router.layer_kind != "dense"]


def _any(spec: Any, layers: int, key: str) -> bool:
    where = place(spec, layers, key)
    return bool(where.replaced or where.inserted_after)


def resolve_config(config: RunConfig, plan: LayoutPlan, before: RunConfig | None) -> RunConfig:
    """The config with the layout's numbers, and the numbers of the model that are fixed at its first launch.

    Args:
        before: the run's config as it was last started: SAM's ``num_groups=rank`` keeps the number of that time in any
            layout, and an empty key may keep an earlier version's value (``unrecorded`` of the strategy's config).
            None: it is the first launch.
    """
    layout = config.layout
    if layout.name == "data_parallel" and plan.expert_parallel > 1:
        layout = dataclasses.replace(layout, name="expert_parallel")
    layout = dataclasses.replace(layout, expert_parallel=plan.expert_parallel, ranks_per_node=plan.ranks_per_node)
    routing = _as_before(config.routing, before.routing) if before is not None else config.routing
    routing = resolve(routing, ranks=plan.expert_parallel, nodes=plan.nodes_per_group)
    return dataclasses.replace(config, layout=layout, routing=routing)


def _as_before(keys: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    empty = [key for key in strategy(str(keys.get("name", ""))).config.unrecorded if keys.get(key) is None]
    found: dict[str, Any] = {key: before[key] for key in empty if key in before}
    for key, value in keys.items():
        earlier = before.get(key)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            found[key] = _as_before(value, earlier)
        elif key not in found:
            found[key] = earlier if value in _WORDS and isinstance(earlier, int) else value
    return found


def build_layout(config: RunConfig, world: World) -> ExpertLayout:
    """The layout with its process groups. Every rank calls it.

    Raises:
        ConfigError: as :func:`plan_run`.
    """
    plan = plan_run(config, world.size, world.local_size)
    return ExpertLayout.build(plan, world.device.type, options=dispatch_options(config))


def dispatch_options(config: RunConfig) -> DispatchOptions:
    """Options of dispatch in training; evaluation uses none, and drops nothing."""
    layout = config.layout
    return DispatchOptions(layout.overlap, layout.fixed_rows)


def pictures(config: RunConfig, plan: LayoutPlan, most_lines: int = 40) -> list[str]:
    """Which rank holds which experts, drawn once for each number of experts; nothing where every rank holds all."""
    if plan.expert_parallel == 1:
        return []
    drawn = []
    for count in dict.fromkeys(routing.num_experts for routing in sparse_routings(config)):
        lines = plan.describe(count).splitlines()
        rest = [f"  and {len(lines) - most_lines} lines more"] if len(lines) > most_lines else []
        drawn.append("\n".join([*lines[:most_lines], *rest]))
    return drawn


def layout_warnings(config: RunConfig, plan: LayoutPlan) -> list[str]:
    """Warnings about layouts that work but are probably not intended."""
    routings = sparse_routings(config)
    if plan.expert_parallel == 1:
        return []
    if not routings:
        return [f"the model has no experts: layout.expert_parallel={plan.expert_parallel} changes nothing"]
    texts = [routing.layout_warning(plan) for routing in routings]
    return list(dict.fromkeys(text for text in texts if text))
