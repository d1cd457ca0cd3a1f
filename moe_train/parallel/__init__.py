"""Experts over ranks: layouts, the exchange of tokens, gradient reduction, counters. Needs torch alone."""

from __future__ import annotations
