"""``routing=hash``: Hash Layers (Roller et al., NeurIPS 2021, arXiv 2106.04426).

``expert = table[token id]`` with a fixed random table; weight 1, no auxiliary loss. The decoder uses the id of its
input token. Tokens without an id (-1) are hashed by their position (the paper's position hash).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_train.routing.base import Router, RouterInputs, RoutingConfig
from moe_train.routing.constant_routing import constant_routing
from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import combine, hash_numbers, uniform_from
from moe_train.routing.registry import register
from moe_train.routing.types import Routing


@dataclass(frozen=True)
class HashConfig(RoutingConfig):
    """Attributes:
    table: ``balanced`` (ids by descending frequency, each assigned to the expert with the fewest tokens) or ``random``.
    """

    name: str = "hash"
    table: Literal["balanced", "random"] = "balanced"


@register("hash", HashConfig)
class HashRouter(Router):
    """One expert per vocabulary id. The table [V] is a buffer, so that it is part of a checkpoint."""

    table: Tensor

    def __init__(self, config: HashConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.seed, self.layer = inputs.seed, inputs.layer
        ids = torch.arange(inputs.vocabulary, device="cpu")
        table = self.hashed(ids)
        if config.table == "balanced":
            frequency = torch.ones_like(ids) if inputs.token_frequency is None else inputs.token_frequency.cpu()
            table = balanced_table(frequency, torch.argsort(self.state(ids)), config.num_experts)
        self.register_buffer("table", table)

    def state(self, ids: Tensor) -> Tensor:
        """Hashes of ids [T], different in every layer."""
        return combine(torch.full_like(ids, hash_numbers(self.seed, self.layer)), ids)

    def hashed(self, ids: Tensor) -> Tensor:
        """Experts [T] of ids [T] by hash, without the table."""
        return (uniform_from(self.state(ids)) * self.num_experts).long()

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d] by the ids in ``context``."""
        ids = context.token_id
        in_table = (ids >= 0) & (ids < len(self.table))
        expert = self.hashed(torch.where(ids >= 0, ids, -2 - context.position))
        if len(self.table):
            expert = torch.where(in_table, self.table[ids.clamp(0, len(self.table) - 1)], expert)
        return constant_routing(x, expert.unsqueeze(1), self.num_experts)

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One."""
        return 1.0

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """None: a look-up."""
        return 0.0


def balanced_table(frequency: Tensor, shuffled: Tensor, num_experts: int) -> Tensor:
    """The greedy table of Roller et al., §3.1: ids by descending frequency, each to the expert with the fewest tokens.

    Args:
        frequency: [V] counts; ones, if they are unknown, give all experts the same number of ids.
        shuffled: [V] the ids in random order, which breaks ties.
    """
    order = shuffled[torch.argsort(frequency[shuffled], descending=True, stable=True)]
    counts = frequency.tolist()
    # (tokens, ids, expert): ids with a count of 0 are distributed evenly too.
    heap = [(0.0, 0, expert) for expert in range(num_experts)]
    table = [0] * len(counts)
    for token in order.tolist():
        load, ids, expert = heap[0]
        table[token] = expert
        heapq.heapreplace(heap, (load + counts[token], ids + 1, expert))
    return torch.tensor(table, dtype=torch.int64, device="cpu")
