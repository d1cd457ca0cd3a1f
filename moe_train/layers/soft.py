"""Soft MoE's layer: tokens mixed into slots, slots through the experts, their outputs mixed back into tokens.

Puigcerver et al., ICLR 2024, arXiv 2308.00951, §2.1; the weights are computed in
:mod:`moe_train.routing.strategies.soft_moe`. Slots are the rows of an ordinary expert pool:
``token = arange, expert = slot // p, weight = 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.experts import ExpertPool
from moe_train.experts.parameters import StackedFeedForward, initialise
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Block, Observation, RoutingRecord
from moe_train.layers.registry import BlockInputs, build_pool, register_kind
from moe_train.routing.base import RoutingConfig
from moe_train.routing.gate import full_precision
from moe_train.routing.registry import build_router
from moe_train.routing.strategies.soft_moe import SoftMixes, SoftMoEConfig, SoftMoERouter
from moe_train.routing.types import RoutingStatistics, entropy_sum


class SoftLayer(Block):
    """Mixes tokens into slots, runs the experts, mixes slots into tokens, per sentence. Without residual or norm."""

    def __init__(self, router: SoftMoERouter, pool: ExpertPool, layer: int = 0) -> None:
        super().__init__()
        self.router = router
        self.pool = pool
        self.layer = layer
        self.owns_norm = pool.spec.norm

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """x [B, S, d] → (y [B, S, d], its record); padding gets 0. Packed rows are unpacked to mix per sentence."""
        x = context.leave(x)
        mixes = self.router.mixes(x, context.padding)
        with full_precision(x):
            slots = mixes.dispatch.transpose(1, 2) @ zero_padding(x, context.padding).to(mixes.dispatch.dtype)
        rows = slots.flatten(0, 1).to(x.dtype)
        routing = self.router(rows)
        outputs = self.pool(rows, routing.assignment).view(slots.shape)
        with full_precision(x):
            y = mixes.combine @ outputs.to(mixes.combine.dtype)
        statistics = mix_statistics(mixes, routing.statistics.load, context)
        return context.enter(y.to(x.dtype)), RoutingRecord(self.layer, {}, statistics)

    def observe(self, x: Tensor, context: BatchContext, record: RoutingRecord) -> Observation:
        """Router inputs, with both mixes."""
        mixes = self.router.mixes(context.leave(x), context.padding)
        return Observation(context.pack(x), mixes=(mixes.dispatch, mixes.combine))


def zero_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """x [B, S, d] with zeros at padding (a weight of 0 times infinity would be NaN)."""
    return x if padding is None else x.masked_fill(padding.unsqueeze(2), 0.0)


def mix_statistics(mixes: SoftMixes, load: Tensor, context: BatchContext) -> RoutingStatistics:
    """Statistics of the mixes; the entropy is that of the combine weights over slots.

    ``extra``: number of ``slots``; ``combine_max``, the largest weight of each token, and ``dispatch_max``, the mean
    over the slots of the token's sentence of their largest weights, both summed over tokens. Means near 1 show that
    soft mixes have become hard choices.
    """
    with torch.no_grad():
        combine, dispatch = mixes.combine, mixes.dispatch
        tokens = torch.full((), context.routing.sentence.shape[0], device=load.device)
        longest = dispatch.amax(1) if dispatch.shape[1] else dispatch.sum(1)  # amax of an empty dimension is an error
        lengths = dispatch.shape[1] if context.padding is None else (~context.padding).sum(1)
        largest = (longest.mean(1) * lengths).sum()
        extra = {"dispatch_max": largest, "combine_max": combine.amax(2).sum(), "slots": load.sum()}
        return RoutingStatistics(load, load, tokens, entropy_sum(combine), extra)


@register_kind("soft")
def build_soft(config: RoutingConfig, inputs: BlockInputs) -> SoftLayer:
    """Builds router and pool of a soft block."""
    router = build_router(config, inputs.for_router())
    assert isinstance(router, SoftMoERouter) and isinstance(config, SoftMoEConfig)
    pool = build_pool(config, inputs)
    if config.identical_experts:
        stacks = [stack for stack in pool.sublayers if isinstance(stack, StackedFeedForward)]
        initialise(stacks, [0] * len(pool.expert_ids))
    return SoftLayer(router, pool, inputs.layer)
