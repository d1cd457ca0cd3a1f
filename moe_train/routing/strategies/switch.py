"""``routing=switch``: Switch Transformer (Fedus, Zoph and Shazeer, JMLR 2022, arXiv 2101.03961, §2).

``p = softmax(W x)``; the token goes to ``e = argmax p`` and ``y = p_e f_e(x)``. Tokens over capacity keep
their residual.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_train.routing.base import RouterInputs, RoutingConfig
from moe_train.routing.capacity import Rounding
from moe_train.routing.context import RoutingContext
from moe_train.routing.gate import LinearGate, switch_init
from moe_train.routing.noise import jitter
from moe_train.routing.registry import register
from moe_train.routing.token_choice import RouterScores, TokenChoiceConfig, TokenChoiceRouter
from moe_train.routing.types import Routing


@dataclass(frozen=True)
class SwitchConfig(TokenChoiceConfig):
    """Keys in addition to those of all token-choice strategies.

    Attributes:
        capacity_rounding: ``result``: the paper's ceil(factor · T / E); ``share``: fairseq's
            floor(factor · ceil(T / E)).
    """

    name: str = "switch"
    capacity_rounding: Rounding = "result"


@register("switch", SwitchConfig)
class SwitchRouter(TokenChoiceRouter):
    """One expert per token, weighted by its probability."""

    def __init__(self, config: SwitchConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config = config
        self.capacity_rounding = config.capacity_rounding
        self.gate = LinearGate(inputs.dim, config.num_experts, switch_init)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]."""
        if self.config.jitter:
            x = jitter(x, self.config.jitter, context)
        logits = self.gate(x)
        probabilities, weights, choices, counts = self.softmax_top_k(logits, 1)
        return self.build_routing(RouterScores(logits, probabilities, counts), choices, weights, context)

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One."""
        return 1.0
