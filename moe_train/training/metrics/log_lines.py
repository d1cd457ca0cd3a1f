"""Metrics of a training: sums over micro-batches, ranks and updates, and the lines of train.jsonl made from them.

All metrics of an update are one fp64 vector, which one all-reduce sums over ranks. Counts below 2^53 stay exact.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.parallel.traffic import TrafficCounters
from moe_train.routing.types import RoutingStatistics
from moe_train.tasks.metric_registry import per_token, reduction

ROUTING = "routing"
_FIELDS = ("load", "requested", "tokens", "entropy")
Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class MetricSums:
    """A criterion's logging output as named numbers that are added; routing statistics are ``routing/<layer>/<field>``.

    Metrics registered as maxima (:mod:`moe_train.tasks.metric_registry`) are not added: the larger value is kept.

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
            named |= {f"{ROUTING}/{layer}/{name}": getattr(statistics, name) for name in _FIELDS}
            named |= {f"{ROUTING}/{layer}/extra.{name}": value for name, value in statistics.extra.items()}
        tensors = [_on_device(named[name], device) for name in sorted(named)]
        layout = tuple((name, tuple(t.shape)) for name, t in zip(sorted(named), tensors, strict=True))
        flat = [t.reshape(-1).double() for t in tensors]
        return cls(layout, torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=device))

    def __add__(self, other: MetricSums) -> MetricSums:
        if self.layout != other.layout:
            names = ", ".join(sorted(str(name) for name in set(self.layout) ^ set(other.layout)))
            raise ValueError(f"a criterion reported other names than before: {names}")
        return self.with_values(self.values + other.values, torch.maximum(self.values, other.values))

    def with_values(self, sums: Tensor, maxima: Tensor) -> MetricSums:
        """The same names with other values, [N] each: ``maxima`` of metrics that are maxima, ``sums`` of the others."""
        if not self.has_maxima:
            return MetricSums(self.layout, sums)
        parts = zip(self.layout, *(values.split(self._sizes) for values in (sums, maxima)), strict=True)
        return MetricSums(self.layout, torch.cat([m if reduction(name) == "max" else s for (name, _), s, m in parts]))

    @property
    def has_maxima(self) -> bool:
        """Whether there are metrics that are maxima."""
        return any(reduction(name) == "max" for name, _ in self.layout)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for _, shape in self.layout]

    def named(self) -> dict[str, Tensor]:
        """Name → fp64 tensor in its shape."""
        pieces = self.values.split(self._sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)}

    def scalars(self) -> dict[str, float]:
        """The 0-dim numbers apart from routing statistics."""
        return {n: float(v) for n, v in self.named().items() if v.dim() == 0 and not n.startswith(f"{ROUTING}/")}

    def routing(self) -> dict[int, RoutingStatistics]:
        """Layer → statistics."""
        layers: dict[int, dict[str, Tensor]] = {}
        for name, value in self.named().items():
            if name.startswith(f"{ROUTING}/"):
                _, layer, field = name.split("/", 2)
                layers.setdefault(int(layer), {})[field] = value
        found = {}
        for number, fields in sorted(layers.items()):
            load, requested, tokens, entropy = (fields[name] for name in _FIELDS)
            extra = {name.removeprefix("extra."): v for name, v in fields.items() if name.startswith("extra.")}
            found[number] = RoutingStatistics(load, requested, tokens, entropy, extra)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON exactly."""
        return {"layout": [[name, list(shape)] for name, shape in self.layout], "values": self.values.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MetricSums:
        """The inverse of :meth:`to_json`, in the host's memory."""
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in content["layout"])
        return cls(layout, torch.tensor(content["values"], dtype=torch.float64, device="cpu"))


def total(parts: Sequence[MetricSums]) -> MetricSums:
    """Their sum; at least one."""
    return functools.reduce(operator.add, parts)


def _on_device(value: Any, device: torch.device) -> Tensor:
    """A number or a tensor as a tensor, without waiting for the device, as torch.tensor would."""
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=torch.float64, device=device)
    return torch.as_tensor(value, device=device).detach()


class MetricInterval:
    """Metrics of the world since the last line of train.jsonl, in the host's memory."""

    def __init__(self) -> None:
        self._sums: MetricSums | None = None
        self._norms: list[float] = []
        self._traffic = TrafficCounters()
        # Of this process: a rate must not count what was done before a resume.
        self._tokens, self._seconds = 0.0, 0.0

    def add(
        self, sums: MetricSums, grad_norm: float | None, seconds: float, traffic: TrafficCounters | None = None
    ) -> None:
        """Adds an update.

        Args:
            sums: of all ranks.
            grad_norm: None if the update was skipped.
            seconds: its time.
            traffic: of all ranks.
        """
        self._sums = sums if self._sums is None else self._sums + sums
        if grad_norm is not None:
            self._norms.append(grad_norm)
        if traffic is not None:
            self._traffic = self._traffic + traffic
        self._tokens += float(sums.named()["ntokens"])
        self._seconds += seconds

    def line(self) -> dict[str, Any]:
        """Losses per token in nats, the mean gradient norm, the speed (target tokens a second), the experts' load.

        Where experts are divided over ranks, also the traffic between these ranks, by link, and the pairs dropped by
        all-to-alls of fixed size.
        """
        if self._sums is None:
            return {}
        content = per_token(self._sums.scalars())
        content["grad_norm"] = math.fsum(self._norms) / len(self._norms) if self._norms else None
        content["words_per_second"] = self._tokens / max(self._seconds, 1e-9)
        if self._traffic.counted:
            content["traffic"] = self._traffic.as_dict()
        if self._traffic.dropped:
            content["exchange_dropped"] = self._traffic.dropped
        return content | describe_routing(self._sums.routing())

    def to_json(self) -> dict[str, Any]:
        """For ``state.json``."""
        if self._sums is None:
            return {}
        return {"sums": self._sums.to_json(), "norms": self._norms, "traffic": self._traffic.numbers()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MetricInterval:
        """The inverse of :meth:`to_json`."""
        interval = cls()
        if content:
            interval._sums = MetricSums.from_json(content["sums"])
            interval._norms = [float(n) for n in content["norms"]]
            interval._traffic += TrafficCounters.of_numbers(content.get("traffic", interval._traffic.numbers()))
        return interval


def describe_routing(layers: Mapping[int, RoutingStatistics]) -> dict[str, Any]:
    """Experts' load as a fraction, its peak over the mean, dead experts, drops; pairs and entropy (nats) per token.

    ``extra_per_token`` holds further statistics of a strategy, divided by its tokens: by layer, then by name.
    """
    if not layers:
        return {}
    load, peak, pairs, entropy, extra = {}, {}, {}, {}, {}
    dead, dropped, requested = 0, 0.0, 0.0
    for number, statistics in layers.items():
        layer, carried, tokens = str(number), float(statistics.load.sum()), max(float(statistics.tokens), 1.0)
        load[layer] = (statistics.load.double() / max(carried, 1.0)).tolist()
        peak[layer] = float(statistics.load.max()) * len(statistics.load) / max(carried, 1.0)
        pairs[layer] = carried / tokens
        entropy[layer] = float(statistics.entropy / statistics.tokens.clamp(min=1))
        dead += int((statistics.load == 0).sum())
        dropped += float(statistics.dropped)
        requested += float(statistics.requested.sum())
        if statistics.extra:
            extra[layer] = {name: (value.double() / tokens).tolist() for name, value in statistics.extra.items()}
    return {
        "load": load,
        "load_max_over_mean": peak,
        "pairs_per_token": pairs,
        "router_entropy": entropy,
        "dead_experts": dead,
        "dropped": int(dropped),
        "dropped_fraction": dropped / max(requested, 1.0),
        **({"extra_per_token": extra} if extra else {}),
    }
