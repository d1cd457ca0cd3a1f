"""How tokens are dispatched, whatever the layout: the same function, other messages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatchOptions:
    """Attributes:
    overlap: what does not need the experts' outcome (a shared expert) is computed while rows are on their way.
    fixed_rows: in training every rank sends exactly so many rows to each other one, padded, and no size is read by the
        host; tokens beyond it lose their experts there, counted. 0: as many as there are.
    """

    overlap: bool = False
    fixed_rows: int = 0
