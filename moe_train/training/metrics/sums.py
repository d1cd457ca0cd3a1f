"""What criterions report, as sums over micro-batches, ranks and updates.

All numbers of an update travel in one fp64 vector and one reduction. Counts below 2^53 stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.routing.types import RoutingStatistics

ROUTING = "routing"
_FIELDS = ("load", "requested", "tokens", "entropy")
Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class MetricSums:
    """Named additive numbers. Routing statistics stand under ``routing/<layer>/<field>``.

    Attributes:
        layout: name and shape of each, in the order of ``values``.
        values: [N] fp64.
    """

    layout: Layout
    values: Tensor

    @classmethod
    def of(cls, logging: Mapping[str, Any], device: torch.device) -> MetricSums:
        """From a criterion's logging output."""
        named = {name: value for name, value in logging.items() if name != ROUTING}
        for layer, statistics in dict(logging.get(ROUTING, {})).items():
            named.update(_flatten(f"{ROUTING}/{layer}", statistics))
        tensors = [torch.as_tensor(named[name], device=device).detach() for name in sorted(named)]
        layout = tuple((name, tuple(t.shape)) for name, t in zip(sorted(named), tensors, strict=True))
        flat = [t.reshape(-1).double() for t in tensors]
        return cls(layout, torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=device))

    def __add__(self, other: MetricSums) -> MetricSums:
        if self.layout != other.layout:
            raise ValueError(f"a criterion reported other names than before: {_difference(self.layout, other.layout)}")
        return MetricSums(self.layout, self.values + other.values)

    def with_values(self, values: Tensor) -> MetricSums:
        """The same names with other numbers (after a reduction)."""
        return MetricSums(self.layout, values)

    def named(self) -> dict[str, Tensor]:
        """Name → fp64 tensor in its shape."""
        pieces = self.values.split([_size(shape) for _, shape in self.layout])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)}

    def scalars(self) -> dict[str, float]:
        """The 0-dim numbers outside routing."""
        return {n: float(v) for n, v in self.named().items() if v.dim() == 0 and not n.startswith(f"{ROUTING}/")}

    def routing(self) -> dict[int, RoutingStatistics]:
        """Layer → statistics."""
        fields: dict[int, dict[str, Tensor]] = {}
        for name, value in self.named().items():
            if name.startswith(f"{ROUTING}/"):
                _, layer, field = name.split("/", 2)
                fields.setdefault(int(layer), {})[field] = value
        return {layer: _rebuild(found) for layer, found in sorted(fields.items())}

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON exactly."""
        return {"layout": [[name, list(shape)] for name, shape in self.layout], "values": self.values.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], device: torch.device) -> MetricSums:
        """The inverse of :meth:`to_json`."""
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in content["layout"])
        return cls(layout, torch.tensor(content["values"], dtype=torch.float64, device=device))


def total(parts: Sequence[MetricSums]) -> MetricSums:
    """Their sum; at least one."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _flatten(prefix: str, statistics: RoutingStatistics) -> dict[str, Tensor]:
    fields = {f"{prefix}/{name}": getattr(statistics, name) for name in _FIELDS}
    return fields | {f"{prefix}/extra.{name}": value for name, value in statistics.extra.items()}


def _rebuild(fields: Mapping[str, Tensor]) -> RoutingStatistics:
    extra = {name.removeprefix("extra."): value for name, value in fields.items() if name.startswith("extra.")}
    load, requested, tokens, entropy = (fields[name] for name in _FIELDS)
    return RoutingStatistics(load, requested, tokens, entropy, extra)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _difference(one: Layout, other: Layout) -> str:
    return ", ".join(sorted(str(name) for name in set(one) ^ set(other)))
