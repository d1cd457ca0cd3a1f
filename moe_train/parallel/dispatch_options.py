"""Options of the dispatch. They change the messages between ranks, not the function computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatchOptions:
    """Attributes:
    overlap: compute a shared expert while rows are being sent.
    fixed_rows: in training every rank sends exactly this many rows to each member, padded, so that the host reads no
        size; pairs beyond it are dropped and counted. 0: variable sizes, nothing is dropped.
    """

    overlap: bool = False
    fixed_rows: int = 0
