"""``routing=top_k``: k experts per token, by default two (GShard, Lepikhin et al., ICLR 2021, arXiv 2006.16668, §2.2).

``p = softmax(W x)``; the token goes to the k experts of highest p and ``y = Σ p_e f_e(x)``, by default with the weights
renormalised to a sum of 1. Options: GShard's and NLLB's policies for the second expert; sigmoid scores with a balancing
bias in place of a balance loss (DeepSeek-V3, arXiv 2412.19437, §2.1.2); a shared expert; V-MoE's noise on the
scores and its losses on the variation of importance and load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_train.config.check import NonNegativeFloat
from moe_train.errors import ConfigError
from moe_train.kernels.cpu.gate_scores import softmax
from moe_train.routing.balance_losses import selection_probability, squared_variation
from moe_train.routing.base import ExpertCount, RouterInputs, RoutingConfig
from moe_train.routing.capacity import Rounding
from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import counter_uniform
from moe_train.routing.gate import LinearGate, linear_init
from moe_train.routing.noise import SECOND_EXPERT, gumbel, jitter, score_noise
from moe_train.routing.registry import register
from moe_train.routing.token_choice import (
    Normalise,
    RouterScores,
    TokenChoiceConfig,
    TokenChoiceRouter,
    best_experts,
    check_top_k,
    normalised,
)
from moe_train.routing.types import RouterLoss, Routing, RoutingStatistics

SecondExpert = Literal["all", "sampling", "random"]


@dataclass(frozen=True)
class TopKConfig(TokenChoiceConfig):
    """Keys in addition to those of all token-choice strategies.

    Attributes:
        top_k: k.
        second_expert: how choices after the first are made in training; evaluation always uses ``all``.
        normalise: divide weights by their sum, before or after drops.
        capacity_rounding: ``result`` takes factor · k · T / E and rounds it up; ``share`` is fairseq's
            floor(factor · k · ceil(T / E)).
        scores: ``softmax`` or ``sigmoid``.
        score_noise: in training N(0, (score_noise / E)²) is added to the logits (V-MoE: 1).
        importance_weight: weight of V-MoE's loss on the squared variation of the experts' summed probabilities.
        load_weight: weight of V-MoE's loss on the squared variation of the experts' expected loads under the noise.
        balancing_bias_rate: step size of the bias added to the scores for selection (not to the weights) to balance
            loads; 0: no bias.
        shared_expert: one more expert that processes every token; built by the layer.
        gate_bias: add a bias to the logits, as some NLLB models do.
    """

    name: str = "top_k"
    top_k: ExpertCount = 2
    second_expert: SecondExpert = "all"
    normalise: Normalise = "after_drop"
    capacity_rounding: Rounding = "result"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    score_noise: NonNegativeFloat = 0.0
    importance_weight: NonNegativeFloat = 0.0
    load_weight: NonNegativeFloat = 0.0
    balancing_bias_rate: NonNegativeFloat = 0.0
    shared_expert: bool = False
    gate_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.top_k, self.num_experts, "routing.num_experts")
        if self.load_weight and (not self.score_noise or self.second_expert != "all" or self.balancing_bias_rate):
            raise ConfigError(
                "routing.load_weight needs noise on the scores as the only source of randomness in the choices",
                remedy="set routing.score_noise=1.0, routing.second_expert=all and routing.balancing_bias_rate=0",
            )
        if self.top_k == 1 and self.normalise != "none":
            raise ConfigError(
                "with routing.top_k=1 normalised weights are always 1 and the gate learns nothing",
                remedy="set routing.normalise=none",
            )
        if self.shared_expert and self.expert_sublayers > 1:
            raise ConfigError(
                "routing.shared_expert works with experts of one sub-layer only",
                remedy="set routing.expert_sublayers=1",
            )
        if self.second_expert == "random" and self.top_k != 2:
            raise ConfigError(
                f"routing.second_expert=random is defined for two experts, not {self.top_k}",
                remedy="set routing.top_k=2, or routing.second_expert=all or sampling",
            )

    @property
    def has_shared_expert(self) -> bool:
        """``shared_expert``."""
        return self.shared_expert


@register("top_k", TopKConfig)
class TopKRouter(TokenChoiceRouter):
    """k experts per token."""

    balancing_bias: Tensor | None

    def __init__(self, config: TopKConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: TopKConfig = config
        self.capacity_rounding = config.capacity_rounding
        self.gate = LinearGate(inputs.dim, config.num_experts, linear_init, bias=config.gate_bias)
        bias = torch.zeros(config.num_experts) if config.balancing_bias_rate else None
        self.register_buffer("balancing_bias", bias)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]."""
        if self.config.jitter:
            x = jitter(x, self.config.jitter, context)
        clean = logits = self.gate(x)
        if self.config.score_noise:
            logits = score_noise(clean, self.config.score_noise, context)
        counts, policy = None, self.policy(context)
        if self.config.scores == "softmax" and self.balancing_bias is None and policy != "sampling":
            scores, weights, choices, counts = self.softmax_top_k(logits, self.config.top_k)
        else:
            scores = self.scores(logits)
            selection = scores.detach() if self.balancing_bias is None else scores.detach() + self.balancing_bias
            choices = select(selection, logits.detach(), self.config.top_k, policy, context)
            weights = scores.gather(1, choices)
        if policy == "random":
            choices, counts = skip_second(choices, weights.detach(), self.config.normalise, context), None
        probabilities = scores if logits is clean else self.scores(clean)
        if self.config.scores == "sigmoid":
            probabilities = normalised(probabilities, None)
        routing = self.build_routing(
            RouterScores(clean, probabilities, counts), choices, weights, context, self.config.normalise
        )
        further = self.variation_losses(RouterScores(clean, probabilities), logits, context)
        return dataclasses.replace(routing, losses={**routing.losses, **further})

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [T, E] of logits [T, E]."""
        return torch.sigmoid(logits) if self.config.scores == "sigmoid" else softmax(logits)

    def variation_losses(self, clean: RouterScores, noisy: Tensor, context: RoutingContext) -> Mapping[str, RouterLoss]:
        """V-MoE's losses with a weight above 0 (Riquelme et al., NeurIPS 2021, arXiv 2106.05974, §A.2)."""
        config = self.config
        found: dict[str, RouterLoss] = {}
        if not context.training:
            return found
        tokens = noisy.shape[0]
        if config.importance_weight:
            importance = clean.probabilities.sum(0)
            found["importance_loss"] = squared_variation(importance, tokens, config.importance_weight)
        if config.load_weight:
            chance = selection_probability(clean.logits, noisy, config.top_k, config.score_noise / self.num_experts)
            found["load_loss"] = squared_variation(chance.sum(0), tokens, config.load_weight)
        return found

    def policy(self, context: RoutingContext) -> SecondExpert:
        """The second-expert policy; evaluation is deterministic."""
        return self.config.second_expert if context.training else "all"

    def may_skip_choices(self, context: RoutingContext) -> bool:
        """True with the random policy, which skips second experts."""
        return self.policy(context) == "random"

    def after_update(self, statistics: RoutingStatistics) -> None:
        """Moves the balancing bias by one step towards equal loads (Wang et al., 2024, arXiv 2408.15664, Alg. 1)."""
        if self.balancing_bias is not None and not self.config.frozen:
            requested = statistics.requested.to(torch.float64)
            step = self.config.balancing_bias_rate * torch.sign(requested.mean() - requested)
            self.balancing_bias += step.to(self.balancing_bias)

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """k; a shared expert is counted as a dense part of the layer."""
        assert isinstance(config, TopKConfig)
        return float(config.top_k)


def select(scores: Tensor, logits: Tensor, k: int, policy: SecondExpert, context: RoutingContext) -> Tensor:
    """The k choices [T, k] of each token.

    Args:
        scores: [T, E], including the balancing bias if there is one.
        logits: [T, E]; ``sampling`` draws the later choices without replacement from their softmax (Gumbel top-k).
    """
    if policy != "sampling" or k == 1:
        return best_experts(scores, k)
    first = scores.argmax(dim=-1, keepdim=True)
    noisy = (logits + gumbel(context, logits.shape[1])).scatter(1, first, float("-inf"))
    return torch.cat((first, best_experts(noisy, k - 1)), dim=1)


def skip_second(choices: Tensor, weights: Tensor, normalise: Normalise, context: RoutingContext) -> Tensor:
    """Replaces the second of two choices by -1 unless 2·g₂ > U(0, 1) (GShard, Alg. 1)."""
    second = weights[:, 1]
    if normalise == "before_drop":
        second = second / weights.sum(-1).clamp(min=torch.finfo(weights.dtype).eps)
    taken = 2 * second > counter_uniform(context, SECOND_EXPERT).squeeze(1)
    return torch.stack((choices[:, 0], torch.where(taken, choices[:, 1], -1)), dim=1)
