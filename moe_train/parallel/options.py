"""How exchanges are carried out, whatever the layout: the same function, other messages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExchangeOptions:
    """Attributes:
    overlap: what does not need the experts' outcome (a shared expert) is computed while rows travel.
    chunks: tokens are carried in so many parts, so that one travels while another is computed; the layer still tells
        the host its sizes once.
    fixed_rows: in training every rank sends exactly so many rows to each other one, padded, and nothing is told to the
        host; tokens beyond it lose their experts there, counted. 0: as many as there are.
    """

    overlap: bool = False
    chunks: int = 1
    fixed_rows: int = 0
