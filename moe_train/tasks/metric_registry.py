"""Metrics that criterions report: how each is reduced and shown. Logs, validation and console look them up here.

Lines of train.jsonl are made in ``training/metrics/log_lines.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COUNTS = ("ntokens", "nsentences", "sample_size")  # in every logging output; what others are divided by

Reduction = Literal["mean", "sum", "max"]


@dataclass(frozen=True)
class LoggedMetric:
    """A metric of a criterion's logging output.

    Attributes:
        reduce: ``mean``: values are summed over micro-batches and ranks, and divided by the target tokens; ``sum``:
            summed; ``max``: the largest.
        shown: how the console prints it, such as "accuracy {:.4f}"; "": not at all.
    """

    reduce: Reduction = "mean"
    shown: str = ""


_METRICS: dict[str, LoggedMetric] = {}


def register_logged_metric(name: str, reduce: Reduction = "mean", shown: str = "") -> None:
    """Says how a metric is reduced and shown. One that is not registered is a mean, logged and not shown.

    Args:
        name: its key in the criterion's logging output, in train.jsonl and in valid.jsonl.
        reduce, shown: see :class:`LoggedMetric`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _METRICS or name in COUNTS:
        raise ValueError(f"the metric {name!r} is registered twice")
    _METRICS[name] = LoggedMetric(reduce, shown)


def reduction(name: str) -> Reduction:
    """How a metric is reduced; counts are summed."""
    return "sum" if name in COUNTS else _METRICS.get(name, LoggedMetric()).reduce


def reduced(name: str, values: Sequence[float]) -> float:
    """Values of several batches as one, before it is divided by tokens."""
    return max(values) if reduction(name) == "max" else math.fsum(values)


def shown_metrics() -> tuple[str, ...]:
    """The names of metrics that are shown, in the order of their registration."""
    return tuple(name for name, metric in _METRICS.items() if metric.shown)


def shown_text(line: Mapping[str, Any]) -> str:
    """``, accuracy 0.9000`` for each shown metric of a log line."""
    return "".join(
        ", " + metric.shown.format(line[name])
        for name, metric in _METRICS.items()
        if metric.shown and line.get(name) is not None
    )


def per_token(sums: Mapping[str, float]) -> dict[str, Any]:
    """A criterion's sums → means per target token, sums and maxima; ``ppl`` is e^(nll_loss)."""
    tokens = sums.get("ntokens", 0.0)
    content: dict[str, Any] = {
        name: value / max(tokens, 1.0) if reduction(name) == "mean" else value
        for name, value in sums.items()
        if name not in COUNTS
    }
    if "nll_loss" in content:
        content["ppl"] = math.exp(min(content["nll_loss"], 700.0))
    return content | {"tokens": int(tokens), "sentences": int(sums.get("nsentences", 0.0))}


register_logged_metric("accuracy", shown="accuracy {:.4f}")
register_logged_metric("macro_f1", shown="macro f1 {:.4f}")
