"""Routing: tokens → Assignment. One file a strategy; importing this package registers them all. Needs torch alone."""

from __future__ import annotations

from moe_train.routing import dense, expert_choice, hash, random, sam, smoe, soft_moe, switch, thor, top_k, xmoe
from moe_train.routing.base import Router, RouterInputs, RoutingConfig
from moe_train.routing.context import Alone, Ranks, RoutingContext
from moe_train.routing.registry import (
    build_router,
    decoder_config,
    find_strategy,
    register,
    resolve,
    routing_config,
    strategies,
    strategy,
)
from moe_train.routing.types import Assignment, AuxiliaryLoss, Routing, RoutingStatistics

__all__ = [
    "Alone",
    "Assignment",
    "AuxiliaryLoss",
    "Ranks",
    "Router",
    "RouterInputs",
    "Routing",
    "RoutingConfig",
    "RoutingContext",
    "RoutingStatistics",
    "build_router",
    "decoder_config",
    "dense",
    "expert_choice",
    "find_strategy",
    "hash",
    "random",
    "register",
    "resolve",
    "routing_config",
    "sam",
    "smoe",
    "soft_moe",
    "strategies",
    "strategy",
    "switch",
    "thor",
    "top_k",
    "xmoe",
]
