"""Numbers of comparisons: means with standard deviations, comparison of two of them, rounding."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


class Mean(float):
    """A mean over seeds with its sample standard deviation."""

    deviation: float

    def __new__(cls, value: float, deviation: float = 0.0) -> Mean:
        """``deviation``: 0 for a single value."""
        made = super().__new__(cls, value)
        made.deviation = deviation
        return made

    def text(self, form: str) -> str:
        """Such as ``0.42 ± 0.03``."""
        return f"{self:{form}} ± {self.deviation:{form}}"


Verdict = bool | None  # whether a claim holds; None: undecided


def above(one: str, first: Mean, other: str, second: Mean, form: str) -> tuple[str, Verdict]:
    """Text of a comparison, and whether the first is larger; None where the difference is within the spread."""
    within = abs(first - second) <= (first.deviation**2 + second.deviation**2) ** 0.5
    text = f"{one} {first.text(form)}, {other} {second.text(form)}"
    return (f"{text}; within the spread", None) if within else (text, first > second)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one value) and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def rounded(value: Any) -> Any:
    """JSON values with numbers rounded to five digits, for readable result files."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
