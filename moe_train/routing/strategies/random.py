"""``routing=random``: a uniformly drawn expert per token, sentence or batch, with weight 1.

A baseline for learnt gates: THOR's analysis (Zuo et al., ICLR 2022, §3) finds that Switch's gate is not better. Draws
are counter-based in training and at evaluation, so equal seeds give equal routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moe_train.routing.base import Router, RouterInputs, RoutingConfig
from moe_train.routing.constant_routing import constant_routing
from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import counter_integer
from moe_train.routing.noise import EXPERT
from moe_train.routing.registry import register
from moe_train.routing.types import Routing


@dataclass(frozen=True)
class RandomConfig(RoutingConfig):
    """Attributes:
    draw: one draw per ``token``, ``sentence`` or ``batch``.
    """

    evaluation_keys: ClassVar[tuple[str, ...]] = ("draw",)
    name: str = "random"
    draw: Literal["token", "sentence", "batch"] = "token"

    @property
    def draws_at_inference(self) -> bool:
        """Always."""
        return True


@register("random", RandomConfig)
class RandomRouter(Router):
    """One random expert per token."""

    def __init__(self, config: RandomConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.draw = config.draw

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d] independently of its values."""
        expert = counter_integer(context, EXPERT, self.num_experts, per=self.draw)
        return constant_routing(x, expert.unsqueeze(1), self.num_experts)

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One."""
        return 1.0

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """None."""
        return 0.0
