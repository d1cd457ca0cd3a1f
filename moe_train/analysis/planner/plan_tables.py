"""Prints a plan as tables, and converts it to JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_train.analysis.planner.choose_layout import Candidate, LayoutComparison, describe_layout
from moe_train.errors import plural
from moe_train.parallel.traffic import LINKS

_MAX_PICTURED = 16  # ranks up to which the layout is drawn


def render(plan: LayoutComparison) -> Group:
    """The output of ``moe-plan``."""
    chosen = plan.chosen
    tables: list[Any] = [_model(chosen), _memory(plan), _traffic(chosen), _time(chosen), _layouts(plan)]
    choice = Text.assemble(("Choice:", "bold"), f" {describe_layout(chosen.layout)}")
    text: list[Text | str] = [choice, *(f"  - {reason}" for reason in plan.reasons)]
    if chosen.layout.world <= _MAX_PICTURED and chosen.shape.sparse:
        text.append(chosen.layout.describe(chosen.shape.sparse[0].num_experts))
    return Group(_cluster(plan), *tables, *text)


def print_plan(plan: LayoutComparison, console: Console) -> None:
    """Prints the tables."""
    console.print(render(plan))


def as_mapping(plan: LayoutComparison) -> dict[str, Any]:
    """JSON values: the cluster, the chosen layout with all details, and all layouts in short."""
    return {
        "cluster": dataclasses.asdict(plan.config.cluster),
        "chosen": _full(plan.chosen),
        "reasons": list(plan.reasons),
        "layouts": [_short(candidate) for candidate in plan.candidates],
    }


def _full(c: Candidate) -> dict[str, Any]:
    return {
        **_short(c),
        "parameters": {
            "total": c.shape.dense_parameters + c.shape.expert_parameters,
            "active": c.shape.active_parameters,
            "experts": c.shape.expert_parameters,
            "per_rank": c.shape.dense_parameters + c.shape.expert_parameters // c.layout.expert_parallel,
        },
        "memory": dataclasses.asdict(c.memory),
        "traffic": {link: dataclasses.asdict(c.traffic.by_link[link]) for link in LINKS},
        "time": dataclasses.asdict(c.time),
        "work": dataclasses.asdict(c.work),
    }


def _short(c: Candidate) -> dict[str, Any]:
    return {
        "world": c.layout.world,
        "expert_parallel": c.layout.expert_parallel,
        "ranks_per_node": c.layout.ranks_per_node,
        "two_level": c.layout.dispatches_by_node,
        "num_groups": c.groups,
        "same_model": c.same_model,
        "fits": c.fits,
        "memory_bytes": c.memory.total,
        "step_seconds": c.time.total,
        "tokens_per_second": c.tokens_per_second,
    }


def _cluster(plan: LayoutComparison) -> Text:
    """The cluster for which the plan is, so that it is not mistaken for another one."""
    cluster, layout = plan.config.cluster, plan.chosen.layout
    nodes, ranks = layout.world // layout.ranks_per_node, layout.ranks_per_node
    have = f"{plural(nodes, 'node')} of {plural(ranks, 'rank')}"
    return Text.assemble(
        ("Cluster:", "bold"),
        f" {cluster.name}, {have}; cluster=… sets another\n"
        f"  per rank: {cluster.memory_gb:g} GB, {cluster.tflops:g} TFLOP/s at {cluster.efficiency:.0%};"
        f" GB/s: {cluster.bandwidth_node:g} in a node, {cluster.bandwidth_across:g} between\n",
    )


def _model(c: Candidate) -> Table:
    table = _table("Parameters", "", "all", "active per token", "on a rank")
    dense, experts = c.shape.dense_parameters, c.shape.expert_parameters
    held = experts / c.layout.expert_parallel
    used = c.shape.active_parameters - dense
    for name, numbers in (
        ("experts", (experts, used, held)),
        ("all others", (dense, dense, dense)),
        ("sum", (experts + dense, used + dense, held + dense)),
    ):
        table.add_row(name, *(_count(n) for n in numbers))
    return table


def _memory(plan: LayoutComparison) -> Table:
    memory = plan.chosen.memory
    table = _table("Memory of a rank", f"of {plan.config.cluster.memory_gb:g} GB", "GB")
    for field in dataclasses.fields(memory):
        table.add_row(field.name, f"{getattr(memory, field.name) / 1e9:.2f}")
    table.add_row("sum", f"{memory.total / 1e9:.2f}", style="bold")
    return table


def _traffic(c: Candidate) -> Table:
    names = ("rows out", "rows back", "payload", "metadata", "gradients")
    table = _table("What a rank sends in a step", "link", *names)
    for link in LINKS:
        sent = c.traffic.by_link[link]
        rows = (_count(sent.dispatched_rows), _count(sent.returned_rows))
        table.add_row(link, *rows, *(_bytes(n) for n in (sent.payload_bytes, sent.metadata_bytes, sent.gradient_bytes)))
    return table


def _time(c: Candidate) -> Table:
    table = _table("Time of a step", "", "ms", "share")
    for field in dataclasses.fields(c.time):
        seconds = getattr(c.time, field.name)
        table.add_row(field.name.replace("_", " "), f"{seconds * 1e3:.2f}", f"{seconds / c.time.total:.0%}")
    table.add_row("sum", f"{c.time.total * 1e3:.2f}", f"{c.tokens_per_second:,.0f} tokens/s", style="bold")
    return table


def _layouts(plan: LayoutComparison) -> Table:
    columns = ("layout", "levels", "groups", "GB", "MB across", "ms exchange", "ms step", "")
    table = _table("Layouts (replicas x expert-parallel), the fastest first; of a rank and step", *columns)
    for c in _shown(plan):
        remarks = ["chosen"] if c is plan.chosen else []
        remarks += [] if c.fits else ["does not fit"]
        remarks += [] if c.same_model else ["another model"]
        across = c.traffic.by_link["across"]
        table.add_row(
            f"{c.layout.replicas} x {c.layout.expert_parallel}",
            "2" if c.layout.dispatches_by_node else "1",
            "" if c.groups is None else str(c.groups),
            f"{c.memory.total / 1e9:.1f}",
            f"{(across.payload_bytes + across.metadata_bytes + across.gradient_bytes) / 1e6:.1f}",
            f"{c.time.exchange * 1e3:.2f}",
            f"{c.time.total * 1e3:.2f}",
            ", ".join(remarks),
            style="bold" if c is plan.chosen else None,
        )
    return table


def _shown(plan: LayoutComparison) -> list[Candidate]:
    """The first layouts, and the chosen one if it is not among them."""
    first = list(plan.candidates[: plan.config.alternatives])
    return first if plan.chosen in first else [*first[:-1], plan.chosen]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _count(number: float) -> str:
    return _scaled(number, ("", " k", " M", " B", " T"))


def _bytes(number: float) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{units[power]}" if power else f"{number:.0f}{units[0]}"
