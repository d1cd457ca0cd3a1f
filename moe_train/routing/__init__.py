"""Routing: tokens → Assignment. Torch only.

Importing this package registers every strategy of :mod:`moe_train.routing.strategies`.
"""

from __future__ import annotations

from moe_train.routing.base import Router, RouterInputs, RoutingConfig
from moe_train.routing.context import LocalReduction, RankReduction, RoutingContext
from moe_train.routing.registry import (
    build_router,
    decoder_config,
    find_strategy,
    register,
    registered_strategies,
    resolve,
    routing_config,
    strategy,
)
from moe_train.routing.strategies import import_all
from moe_train.routing.types import Assignment, AuxiliaryLoss, Routing, RoutingStatistics

__all__ = [
    "Assignment",
    "AuxiliaryLoss",
    "LocalReduction",
    "RankReduction",
    "Router",
    "RouterInputs",
    "Routing",
    "RoutingConfig",
    "RoutingContext",
    "RoutingStatistics",
    "build_router",
    "decoder_config",
    "find_strategy",
    "register",
    "registered_strategies",
    "resolve",
    "routing_config",
    "strategy",
]

import_all()
