"""A router and a pool of experts as one layer: y_t = Σ over pairs (t, e, w) of w · f_e(x_t)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_train.experts import ExpertPool
from moe_train.layers.block import Block, RoutingRecord
from moe_train.layers.context import BatchContext
from moe_train.layers.registry import BlockInputs, register_kind
from moe_train.routing.base import Router, RoutingConfig
from moe_train.routing.registry import build_router


class SparseLayer(Block):
    """Routes the real tokens and lets the pool carry out the assignment. No residual, and no norm of its own.

    The router always runs in fp32: under autocast its scores are computed outside it, and its parameters stay fp32
    where the model is cast to a 16-bit type.
    """

    def __init__(self, router: Router, pool: ExpertPool, layer: int = 0) -> None:
        super().__init__()
        self.router = router
        self.pool = pool
        self.layer = layer
        self.owns_norm = pool.spec.norm

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """x [B, S, d] → (y [B, S, d], its record); padding gets 0."""
        tokens = context.pack(x)
        with torch.autocast(x.device.type, enabled=False):
            routing = self.router(tokens, context.routing.at_layer(self.layer))
        y = self.pool(tokens, routing.assignment)
        return context.unpack(y), RoutingRecord(self.layer, routing.losses, routing.statistics, (routing,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.router.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        return self


@register_kind("sparse")
def build_sparse(config: RoutingConfig, inputs: BlockInputs) -> SparseLayer:
    """Router, then pool, of one sparse block."""
    router = build_router(config, inputs.for_router())
    pool = ExpertPool(inputs.expert_spec(config), config.num_experts, inputs.layout)
    return SparseLayer(router, pool, inputs.layer)
