"""Collects routing statistics while a model is evaluated: load, drops, entropy and those of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_train.layers import Block, RoutingRecord
from moe_train.routing.types import RoutingStatistics
from moe_train.training.metrics.log_lines import ROUTING, MetricSums, describe_routing, total


@contextmanager
def collect_routing(model: Any) -> Iterator[Callable[[], MetricSums]]:
    """Yields a function that returns the sum of all that the model's sparse blocks have routed within the context."""
    seen: dict[int, list[RoutingStatistics]] = {}

    def record_routing(block: Any, inputs: Any, output: tuple[Any, RoutingRecord | None]) -> None:
        if (record := output[1]) is not None:
            seen.setdefault(record.layer, []).append(record.statistics)

    modules = model.modules() if isinstance(model, nn.Module) else ()
    handles = [module.register_forward_hook(record_routing) for module in modules if isinstance(module, Block)]
    try:
        # Summed when called, so that no step of the search waits for it.
        yield lambda: _sum(seen)
    finally:
        for handle in handles:
            handle.remove()


def _sum(seen: Mapping[int, list[RoutingStatistics]]) -> MetricSums:
    device = torch.device("cpu")
    layers = {
        layer: total([MetricSums.of({ROUTING: {layer: part}}, device) for part in parts]).routing()[layer]
        for layer, parts in seen.items()
    }
    return MetricSums.of({ROUTING: layers}, device)


def describe_routed(sums: MetricSums) -> dict[str, Any]:
    """:func:`describe_routing` and the number of tokens of each layer; empty without sparse blocks."""
    layers = sums.routing()
    tokens = {str(layer): int(found.tokens) for layer, found in layers.items()}
    return {**describe_routing(layers), "tokens": tokens} if layers else {}


def describe_sum(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """:func:`describe_routed` of the sum of several :meth:`MetricSums.to_json`."""
    return describe_routed(total([MetricSums.from_json(part) for part in parts])) if parts else {}
