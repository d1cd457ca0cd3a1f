"""``routing=thor``: Transformer with Stochastic Experts (Zuo et al., ICLR 2022, arXiv 2110.04260).

No gate: experts are drawn at random in training and at inference, with weight 1. Training makes two passes over each
batch with different experts and adds ``α/2 [KL(p₁‖p₂) + KL(p₂‖p₁)]`` so that the experts agree (``routing.passes=2``,
``routing.consistency_weight`` = α). The criterion computes this loss; with one expert it is R-Drop's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_train.routing.base import ExpertPlacement, Router, RouterInputs, RoutingConfig
from moe_train.routing.constant_routing import constant_routing
from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import counter_integer, hash_numbers
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.noise import EXPERT, PARTNER
from moe_train.routing.registry import register
from moe_train.routing.types import Routing

Inference = Literal["token", "sentence", "position", "fixed", "ensemble"]


@dataclass(frozen=True)
class ThorConfig(RoutingConfig):
    """Keys of THOR.

    Attributes:
        draw: one expert per ``token``, ``sentence`` or ``batch`` in training; the paper draws one per layer, pass and
            ``batch``.
        pair: the experts of the two passes are ``distinct`` (the paper), or ``independent`` draws, which may be equal
            (the official code).
        inference: one expert per ``token`` or ``sentence`` (the paper's Dispatch(t) and Dispatch(s)), or per
            ``position`` (the official code's Dispatch(s): all sentences share the expert of a position); ``fixed``: one
            expert of each layer for everything, drawn once from the seed, so that the model is a dense one (not in the
            paper; training makes the experts agree); ``ensemble`` averages the outputs of all experts.
    """

    evaluation_keys: ClassVar[tuple[str, ...]] = ("inference",)
    name: str = "thor"
    passes: int = 2
    consistency_weight: float = 5.0
    draw: Literal["batch", "sentence", "token"] = "batch"
    pair: Literal["distinct", "independent"] = "distinct"
    inference: Inference = "sentence"

    @property
    def draws_at_inference(self) -> bool:
        """Unless all experts are averaged."""
        return self.inference != "ensemble"

    def layout_warning(self, placement: ExpertPlacement) -> str | None:
        """A warning with ``draw=batch``: a pass uses one expert, and so one rank."""
        if self.draw != "batch":
            return None
        return (
            "routing.draw=batch sends all tokens of a pass to one expert, and so to one rank of"
            f" {placement.expert_parallel} while the others wait; routing.draw=sentence or token keeps them all busy"
        )


@register("thor", ThorConfig)
class ThorRouter(Router):
    """One random expert per token and pass; no parameters."""

    def __init__(self, config: ThorConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: ThorConfig = config

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d] independently of its values."""
        if not context.training and self.config.inference == "ensemble":
            all_experts = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
            return constant_routing(x, all_experts, self.num_experts, weight=1 / self.num_experts)
        if not context.training and (fixed := self.fixed_expert(context.seed, context.layer)) is not None:
            expert = torch.full((x.shape[0], 1), fixed, device=x.device)
            return constant_routing(x, expert, self.num_experts)
        return constant_routing(x, self.drawn(context).unsqueeze(1), self.num_experts)

    def fixed_expert(self, seed: int, layer: int) -> int | None:
        """With ``inference=fixed`` the expert of a layer, independent of the update."""
        return hash_numbers(seed, layer, EXPERT) % self.num_experts if self.config.inference == "fixed" else None

    def drawn(self, context: RoutingContext) -> Tensor:
        """The expert [T] of each token, uniformly distributed in every pass."""
        per = self.config.draw if context.training else self.config.inference
        if not context.training or self.config.pair == "independent" or self.num_experts == 1:
            return counter_integer(context, EXPERT, self.num_experts, per=per)
        both = dataclasses.replace(context, pass_index=torch.zeros_like(context.pass_index))
        first = counter_integer(both, EXPERT, self.num_experts, per=per)
        step = 1 + counter_integer(both, PARTNER, self.num_experts - 1, per=per)
        return (first + context.pass_index * step) % self.num_experts

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """One, or E for the ensemble."""
        assert isinstance(config, ThorConfig)
        return float(config.num_experts) if config.inference == "ensemble" else 1.0

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """One expert in training, independent of ``inference``."""
        return (ExpectedChoices(1.0, 0, config.num_experts, 1),)

    @classmethod
    def max_load_share(cls, config: RoutingConfig, parts: int) -> float:
        """With ``draw=batch`` each pass uses one expert: both in one part, or half of the rows in each of two."""
        assert isinstance(config, ThorConfig)
        if config.draw != "batch":
            return 1.0 / parts
        held = config.num_experts / parts
        distinct = config.pair == "distinct" and config.num_experts > 1
        both = (held - 1) / (config.num_experts - 1) if distinct else 1.0 / parts
        return 1.0 if config.passes == 1 else both + (1.0 - both) / 2

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """None."""
        return 0.0
