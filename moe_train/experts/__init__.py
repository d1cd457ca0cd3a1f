"""Experts: the pool that computes what routers assign."""

from __future__ import annotations

from moe_train.experts.pool import ExpertPool
from moe_train.experts.spec import ExpertSpec
from moe_train.parallel.gradients import is_expert

__all__ = ["ExpertPool", "ExpertSpec", "is_expert"]
