"""State of a run apart from tensors, kept in every checkpoint's ``state.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """The training loop's mutable state.

    Attributes:
        update: optimizer updates done (skipped ones count: their batch is spent).
        epoch: of the last update, from 1.
        best: the best value of the validation metric so far, None before the first validation.
        best_update: when that was.
        without_gain: validations since.
        skipped: updates skipped because a gradient was not finite, in all.
        skipped_in_row: the same, since the last good one.
        pending: whether the validation that follows ``update`` is yet to come, because a signal came first.
        plan_version: of the way in which batches are planned; runs that do not record it have the first.
        interval: sums since the last line of train.jsonl, of ``MetricInterval.to_json``.
        engine: the engine's state apart from tensors.
    """

    update: int = 0
    epoch: int = 1
    best: float | None = None
    best_update: int = 0
    without_gain: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    pending: bool = False
    plan_version: int = 1
    interval: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunState:
        """The inverse of :meth:`to_json`; further keys are ignored.

        Raises:
            ValueError: a value is of another kind.
        """
        state = cls()
        for name, default in asdict(state).items():
            if name in content:
                value = content[name]
                if not _fits(value, default):
                    raise ValueError(f"'{name}' cannot be {value!r:.40}")
                setattr(state, name, value)
        return state


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the type of a field; ``best`` is a number, or None as its default is."""
    if default is None:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return type(value) is type(default) and (not isinstance(value, int) or value >= 0)
