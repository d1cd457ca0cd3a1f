"""Lines of train.jsonl: what happened since the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from moe_train.parallel.traffic import TrafficCounters
from moe_train.routing.types import RoutingStatistics
from moe_train.training.metrics.sums import MetricSums

COUNTS = ("ntokens", "nsentences", "sample_size")
# Fields that tell of the clock: all others are the same in a run that was interrupted and resumed.
TIMES = ("words_per_second", "images_per_second")


class MetricInterval:
    """World sums since the last line."""

    def __init__(self) -> None:
        self._sums: MetricSums | None = None
        self._norms: list[float] = []
        self._traffic = TrafficCounters()
        # Of this process: a rate must not count what was done before a resume.
        self._tokens, self._seconds = 0.0, 0.0

    def add(
        self, sums: MetricSums, grad_norm: float | None, seconds: float, traffic: TrafficCounters | None = None
    ) -> None:
        """An update's world sums, ``grad_norm`` None where it was skipped, its time, and what all ranks have sent."""
        self._sums = sums if self._sums is None else self._sums + sums
        if grad_norm is not None:
            self._norms.append(grad_norm)
        if traffic is not None:
            self._traffic = self._traffic + traffic
        self._tokens += float(sums.named()["ntokens"])
        self._seconds += seconds

    def line(self) -> dict[str, Any]:
        """Losses per token in nats, the gradient norm's mean, the speed (target tokens a second), the experts' load.

        Where experts are divided over ranks, also the traffic between these, by link, all ranks together, and the pairs
        that exchanges of fixed size had no room for.
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
    def from_json(cls, content: Mapping[str, Any], device: torch.device) -> MetricInterval:
        """The inverse of :meth:`to_json`."""
        interval = cls()
        if content:
            interval._sums = MetricSums.from_json(content["sums"], device)
            interval._norms = [float(n) for n in content["norms"]]
            interval._traffic += TrafficCounters.of_numbers(content.get("traffic", interval._traffic.numbers()))
        return interval


def per_token(scalars: Mapping[str, float]) -> dict[str, Any]:
    """Sums → means per target token; ``ppl`` is e^(nll_loss)."""
    tokens = scalars.get("ntokens", 0.0)
    content: dict[str, Any] = {n: v / max(tokens, 1.0) for n, v in scalars.items() if n not in COUNTS}
    if "nll_loss" in content:
        content["ppl"] = math.exp(min(content["nll_loss"], 700.0))
    return content | {"tokens": int(tokens), "sentences": int(scalars.get("nsentences", 0.0))}


def describe_routing(layers: Mapping[int, RoutingStatistics]) -> dict[str, Any]:
    """Experts' load as a fraction, its peak over the mean, dead experts, drops; pairs and entropy (nats) per token.

    ``extra_per_token`` holds what a strategy counts besides, over its tokens: by layer, then by name.
    """
    if not layers:
        return {}
    load, peak, pairs, entropy, dead, dropped, requested = {}, {}, {}, {}, 0, 0.0, 0.0
    for layer, statistics in layers.items():
        carried = float(statistics.load.sum())
        load[str(layer)] = (statistics.load.double() / max(carried, 1.0)).tolist()
        peak[str(layer)] = float(statistics.load.max()) * len(statistics.load) / max(carried, 1.0)
        pairs[str(layer)] = carried / max(float(statistics.tokens), 1.0)
        entropy[str(layer)] = float(statistics.entropy / statistics.tokens.clamp(min=1))
        dead += int((statistics.load == 0).sum())
        dropped += float(statistics.dropped)
        requested += float(statistics.requested.sum())
    extra = {str(layer): _extra(statistics) for layer, statistics in layers.items() if statistics.extra}
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


def _extra(statistics: RoutingStatistics) -> dict[str, Any]:
    tokens = max(float(statistics.tokens), 1.0)
    return {name: (value.double() / tokens).tolist() for name, value in statistics.extra.items()}
