"""``routing=dense``: no experts; every layer has a dense feed-forward. The baseline of all comparisons."""

from __future__ import annotations

from typing import ClassVar

from moe_train.routing.base import LayerKind, Router, RoutingConfig
from moe_train.routing.registry import register


@register("dense", RoutingConfig)
class DenseRouter(Router):
    """Used for accounting only: the layer kind ``dense`` has no router."""

    layer_kind: ClassVar[LayerKind] = "dense"

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One: the feed-forward itself."""
        return 1.0

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """None."""
        return 0.0
