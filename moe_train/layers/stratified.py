"""SMoE's block: up to L passes of one pool of experts, each behind a gate, a norm and a residual of its own.

Xu et al., Findings of EMNLP 2023, arXiv 2305.02176, §3 (Eq. 4-7); the routing is in
:mod:`moe_train.routing.strategies.smoe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_train.experts import ExpertPool
from moe_train.kernels.cpu.dropout import dropout
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Block, Observation, RoutingRecord
from moe_train.layers.registry import BlockInputs, build_pool, register_kind
from moe_train.routing.base import RoutingConfig
from moe_train.routing.context import RoutingContext
from moe_train.routing.registry import build_router
from moe_train.routing.strategies.smoe import SMoERouter
from moe_train.routing.types import Routing, RoutingStatistics


class StratifiedLayer(Block):
    """Tokens pass the strata that they ask for; the block owns its norms and residuals.

    All L passes are always run, with however few tokens, so that ranks keep in step.

    Args:
        router: the gates of the strata.
        pool: the experts of all strata.
        layer: number of the sparse block in the model.
        dropout: of each pass's output.
    """

    owns_residual: ClassVar[bool] = True

    def __init__(self, router: SMoERouter, pool: ExpertPool, layer: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = router
        self.pool = pool
        self.layer = layer
        self.dropout = dropout
        self.official = router.config.norm == "official"
        # paper: one before each pass; official: one before the first, and one on the way into each later state.
        count = len(router.strata) + int(self.official)
        self.norms = nn.ModuleList(nn.LayerNorm(pool.spec.dim) for _ in range(count))

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """x [B, S, d] → (x after all passes [B, S, d], the record); padding stays as it is."""
        routing = context.routing.at_layer(self.layer)
        rows, passes = self.passes(context.pack(x), routing)
        flat = rows if context.real is None else x.reshape(-1, x.shape[-1]).index_copy(0, context.real, rows)
        losses = self.router.block_losses(passes, routing.ranks)
        return flat.view(x.shape), RoutingRecord(self.layer, losses, sum_passes(passes), tuple(passes))

    def observe(self, x: Tensor, context: BatchContext, record: RoutingRecord) -> Observation:
        """The first gate's view, behind its norm, and the passes asked for."""
        return Observation(self.norms[0](context.pack(x)), passes=requested_capacity(record.routing))

    def passes(self, rows: Tensor, context: RoutingContext) -> tuple[Tensor, list[Routing]]:
        """rows [T, d] → (rows after their passes, the routing of each pass over all T tokens)."""
        stratum = torch.zeros_like(context.sentence)
        done: list[Routing] = []
        for i in range(len(self.router.strata)):
            active = (stratum == i).nonzero().squeeze(1)
            rows, routing = self.one_pass(rows, active, context, i)
            stratum = stratum.index_copy(0, active, self.router.next_stratum(routing.choices))
            if self.official:
                rows = self.norm_on_entry(rows, active, stratum, i)
            done.append(over_all_tokens(routing, active, rows.shape[0]))
        return rows, done

    def one_pass(self, rows: Tensor, active: Tensor, context: RoutingContext, i: int) -> tuple[Tensor, Routing]:
        """Adds to the active rows what their experts of this pass give."""
        h = rows[active]
        if not self.official or i == 0:
            h = self.norms[i](h)
        with torch.autocast(rows.device.type, enabled=False):
            routing = self.router(h, context.select(active), i)
        y = dropout(self.pool(h, routing.assignment), self.dropout, self.training)
        return rows.index_add(0, active, y.to(rows.dtype)), routing

    def norm_on_entry(self, rows: Tensor, active: Tensor, stratum: Tensor, i: int) -> Tensor:
        """The official code: tokens that come into a later stratum, or leave, are normalised in the stream itself."""
        for state in range(i + 1, len(self.norms)):
            entering = active[stratum[active] == state]
            rows = rows.index_copy(0, entering, self.norms[state](rows[entering]).to(rows.dtype))
        return rows


def over_all_tokens(routing: Routing, active: Tensor, tokens: int) -> Routing:
    """The routing of some tokens as one of all: rows are those of the T tokens, others choose nothing (-1)."""
    choices = routing.choices.new_full((tokens, routing.choices.shape[1]), -1)
    return dataclasses.replace(
        routing,
        assignment=dataclasses.replace(routing.assignment, token=active[routing.assignment.token]),
        choices=choices.index_copy(0, active, routing.choices),
        kept=torch.zeros_like(choices, dtype=torch.bool).index_copy(0, active, routing.kept),
    )


def requested_capacity(passes: Sequence[Routing]) -> Tensor:
    """[T] int64: passes that each token asked for (§5), from a record's ``routing``."""
    return torch.stack([p.choices[:, 0] >= 0 for p in passes]).sum(0)


def sum_passes(passes: Sequence[Routing]) -> RoutingStatistics:
    """Counts over all passes. The entropy is the first gate's, which sees every token and every expert once.

    ``extra["passes"]`` [L] counts the tokens that asked for 1, 2 … L passes.
    """
    first = passes[0].statistics
    requested = requested_capacity(passes)
    histogram = torch.zeros(len(passes), dtype=torch.int64, device=requested.device)
    return RoutingStatistics(
        load=torch.stack([p.statistics.load for p in passes]).sum(0),
        requested=torch.stack([p.statistics.requested for p in passes]).sum(0),
        tokens=first.tokens,
        entropy=first.entropy,
        extra={"passes": histogram.scatter_add(0, requested - 1, torch.ones_like(requested))},
    )


@register_kind("stratified")
def build_stratified(config: RoutingConfig, inputs: BlockInputs) -> StratifiedLayer:
    """Gates and pool of one stratified block."""
    router = build_router(config, inputs.for_router())
    assert isinstance(router, SMoERouter)
    pool = build_pool(config, inputs)
    return StratifiedLayer(router, pool, inputs.layer, inputs.dropout)
