"""Sparse layer of a router and an expert pool: y_t = Σ over pairs (t, e, w) of w · f_e(x_t)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.experts import ExpertPool
from moe_train.experts.packed_pool import PackedPool
from moe_train.layers.batch_context import BatchContext
from moe_train.layers.block import Block, RoutingRecord
from moe_train.layers.feed_forward import FeedForward
from moe_train.layers.registry import BlockInputs, build_pool, register_kind
from moe_train.routing.base import Router, RoutingConfig
from moe_train.routing.registry import build_router
from moe_train.routing.types import Assignment


class SparseLayer(Block):
    """Routes the real tokens and runs the pool on the assignment. Without residual or norm.

    The router always runs in at least fp32: autocast is disabled for it, and its parameters stay fp32 when the model is
    cast to a 16-bit type (:class:`~moe_train.routing.base.Router`).

    Args:
        shared: one more expert that processes every token, with weight 1 (DeepSeekMoE, Dai et al., 2024, §3.2).
    """

    def __init__(self, router: Router, pool: ExpertPool, layer: int = 0, shared: FeedForward | None = None) -> None:
        super().__init__()
        self.router = router
        self.pool = pool
        self.shared = shared
        self.layer = layer
        self.packed: PackedPool | None = None  # in a search, in place of the pool
        self.owns_norm = pool.spec.norm

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """x [B, S, d] → (y [B, S, d], its record); padding gets 0."""
        tokens = context.pack(x)
        with torch.autocast(x.device.type, enabled=False):
            routing = self.router(tokens, context.routing.at_layer(self.layer, self.pool.fixed_size))
        y = self._experts(tokens, routing.assignment)
        return context.unpack(y), RoutingRecord(self.layer, routing.losses, routing.statistics, (routing,))

    def _experts(self, tokens: Tensor, assignment: Assignment) -> Tensor:
        """[T, d]: sum over each token's experts and the shared expert, which may overlap with the all-to-alls."""
        if self.packed is not None:
            y = self.packed(tokens, assignment)
            return y if self.shared is None else y.add(self.shared(tokens)[0])
        pending = self.pool.start(tokens, assignment)
        if self.shared is None:
            return self.pool.finish(pending)
        if self.pool.overlaps:
            shared, _ = self.shared(tokens)
            return self.pool.finish(pending).add(shared)
        y = self.pool.finish(pending)
        return y.add(self.shared(tokens)[0])


@register_kind("sparse")
def build_sparse(config: RoutingConfig, inputs: BlockInputs) -> SparseLayer:
    """Builds router, pool and shared expert of a sparse block (in this order: initial weights depend on it)."""
    router = build_router(config, inputs.for_router())
    pool = build_pool(config, inputs)
    shared = None
    if config.has_shared_expert:
        spec = pool.spec
        shared = FeedForward(spec.dim, spec.hidden, spec.activation, spec.dropout)
    return SparseLayer(router, pool, inputs.layer, shared)
