"""What routers counted while a model was evaluated: load, drops, entropy and whatever else a strategy counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_train.layers import Block, RoutingRecord
from moe_train.routing.types import RoutingStatistics
from moe_train.training.metrics.sums import ROUTING, MetricSums, describe_routing, total


@contextmanager
def counting(model: Any) -> Iterator[Callable[[], MetricSums]]:
    """Gives what counts, when it is called, everything that the model's sparse blocks have routed inside."""
    seen: dict[int, list[RoutingStatistics]] = {}

    def listen(block: Any, inputs: Any, output: tuple[Any, RoutingRecord | None]) -> None:
        if (record := output[1]) is not None:
            seen.setdefault(record.layer, []).append(record.statistics)

    modules = model.modules() if isinstance(model, nn.Module) else ()
    handles = [module.register_forward_hook(listen) for module in modules if isinstance(module, Block)]
    try:
        # Summed afterwards: a step of the search must not wait for it.
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
    """:func:`describe_routing` and the tokens of each layer; empty without sparse blocks."""
    layers = sums.routing()
    tokens = {str(layer): int(found.tokens) for layer, found in layers.items()}
    return {**describe_routing(layers), "tokens": tokens} if layers else {}


def describe_all(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """:func:`describe_routed` of the sum of what :meth:`MetricSums.to_json` gave."""
    return describe_routed(total([MetricSums.from_json(part, torch.device("cpu")) for part in parts])) if parts else {}
