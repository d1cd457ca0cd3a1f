"""Experts: the pool that carries out what routers assign."""

from __future__ import annotations

from moe_train.experts.parameters import is_expert
from moe_train.experts.pool import ExpertPool
from moe_train.experts.spec import ExpertSpec

__all__ = ["ExpertPool", "ExpertSpec", "is_expert"]
