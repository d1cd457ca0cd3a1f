"""What routers counted while a model was evaluated: load, drops, entropy and whatever else a strategy counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.layers import Block, RoutingRecord
from moe_train.routing.types import RoutingStatistics
from moe_train.training.journal import describe_routing
from moe_train.training.statistics import ROUTING, Sums, total


@contextmanager
def counting(model: Any) -> Iterator[Callable[[], Sums]]:
    """Gives what counts, when it is called, everything that the model's sparse blocks have routed inside."""
    records: list[RoutingRecord] = []

    def listen(block: Any, inputs: Any, output: tuple[Any, RoutingRecord | None]) -> None:
        if output[1] is not None:
            records.append(output[1])

    modules = model.modules() if isinstance(model, nn.Module) else ()
    handles = [module.register_forward_hook(listen) for module in modules if isinstance(module, Block)]
    try:
        # Summed afterwards: a step of the search must not wait for it.
        yield lambda: _sum(records)
    finally:
        for handle in handles:
            handle.remove()


def _sum(records: list[RoutingRecord]) -> Sums:
    layers: dict[int, list[RoutingStatistics]] = {}
    for record in records:
        layers.setdefault(record.layer, []).append(record.statistics)
    return Sums.of({ROUTING: {layer: _added(parts) for layer, parts in layers.items()}}, torch.device("cpu"))


def _added(parts: list[RoutingStatistics]) -> RoutingStatistics:
    def add(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(values)).sum(0)

    return RoutingStatistics(
        add(part.load for part in parts),
        add(part.requested for part in parts),
        add(part.tokens for part in parts),
        add(part.entropy for part in parts),
        {name: add(part.extra[name] for part in parts) for name in parts[0].extra},
    )


def describe_routed(sums: Sums) -> dict[str, Any]:
    """:func:`describe_routing` and the tokens of each layer; empty without sparse blocks."""
    layers = sums.routing()
    tokens = {str(layer): int(found.tokens) for layer, found in layers.items()}
    return {**describe_routing(layers), "tokens": tokens} if layers else {}


def describe_all(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """:func:`describe_routed` of the sum of what :meth:`Sums.to_json` gave."""
    return describe_routed(total([Sums.from_json(part, torch.device("cpu")) for part in parts])) if parts else {}
