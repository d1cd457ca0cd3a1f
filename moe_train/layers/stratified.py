"""SMoE's block: up to L passes through one expert pool, each with its own gate, norm and residual.

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
from moe_train.layers.transformer import Norm
from moe_train.routing.base import RoutingConfig
from moe_train.routing.context import RoutingContext
from moe_train.routing.registry import build_router
from moe_train.routing.strategies.smoe import SMoERouter
from moe_train.routing.types import Routing, RoutingStatistics


class StratifiedLayer(Block):
    """Passes tokens through the strata; the block owns its norms and residuals.

    All L passes always run, even without tokens, so that all ranks run the same collectives.

    Args:
        router: gates of the strata.
        pool: experts of all strata.
        layer: number of the sparse block in the model.
        dropout: dropout of each pass's output.
    """

    owns_residual: ClassVar[bool] = True

    def __init__(self, router: SMoERouter, pool: ExpertPool, layer: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = router
        self.pool = pool
        self.layer = layer
        self.dropout = dropout
        self.official = router.config.norm == "official"
        # paper: one before each pass; official: one before the first pass, and one on entry into each later state.
        count = len(router.strata) + int(self.official)
        self.norms = nn.ModuleList(Norm(pool.spec.dim) for _ in range(count))

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """x [B, S, d] → (x after all passes [B, S, d], the record); padding is not changed."""
        routing = context.routing.at_layer(self.layer)
        rows, passes = self.passes(context.pack(x), routing)
        losses = self.router.block_losses(passes)
        return context.replace(x, rows), RoutingRecord(self.layer, losses, sum_passes(passes), tuple(passes))

    def observe(self, x: Tensor, context: BatchContext, record: RoutingRecord) -> Observation:
        """Inputs of the first gate (after its norm), and the passes of each token."""
        return Observation(self.norms[0](context.pack(x)), passes=requested_capacity(record.routing))

    def passes(self, rows: Tensor, context: RoutingContext) -> tuple[Tensor, list[Routing]]:
        """rows [T, d] → (rows after all passes, the routing of each pass over all T tokens)."""
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
        """Adds the experts' outputs of pass i to the active rows."""
        h = rows[active]
        if not self.official or i == 0:
            h = self.norms[i](h)
        with torch.autocast(rows.device.type, enabled=False):
            routing = self.router(h, context.select(active), i)
        y = dropout(self.pool(h, routing.assignment), self.dropout, self.training)
        return rows.index_add(0, active, y.to(rows.dtype)), routing

    def norm_on_entry(self, rows: Tensor, active: Tensor, stratum: Tensor, i: int) -> Tensor:
        """Official code: normalises the residual stream of tokens that enter a later stratum or leave."""
        for state in range(i + 1, len(self.norms)):
            entering = active[stratum[active] == state]
            rows = rows.index_copy(0, entering, self.norms[state](rows[entering]).to(rows.dtype))
        return rows


def over_all_tokens(routing: Routing, active: Tensor, tokens: int) -> Routing:
    """The routing of the ``active`` tokens as a routing of all T tokens; the others have no choice (-1)."""
    choices = routing.choices.new_full((tokens, routing.choices.shape[1]), -1)
    return dataclasses.replace(
        routing,
        assignment=dataclasses.replace(routing.assignment, token=active[routing.assignment.token], per_token=0),
        choices=choices.index_copy(0, active, routing.choices),
        kept=torch.zeros_like(choices, dtype=torch.bool).index_copy(0, active, routing.kept),
    )


def requested_capacity(passes: Sequence[Routing]) -> Tensor:
    """[T] int64: number of passes that each token requested (§5), from a record's ``routing``."""
    return torch.stack([p.choices[:, 0] >= 0 for p in passes]).sum(0)


def sum_passes(passes: Sequence[Routing]) -> RoutingStatistics:
    """Sums of counts over all passes. The entropy is the first gate's, which gets all tokens and all experts.

    ``extra["passes"]`` [L]: number of tokens that requested 1, 2 … L passes.
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
    """Builds gates and pool of a stratified block."""
    router = build_router(config, inputs.for_router())
    assert isinstance(router, SMoERouter)
    pool = build_pool(config, inputs)
    return StratifiedLayer(router, pool, inputs.layer, inputs.dropout)
