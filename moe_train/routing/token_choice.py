"""Base class of routers in which each token chooses its experts: capacity, combine weights, losses, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_train.config.check import NonNegativeFloat, PositiveFloat, Probability
from moe_train.errors import ConfigError
from moe_train.kernels.cpu.gate_scores import softmax
from moe_train.routing.balance_losses import BalanceLoss, MeanOverTokens, rank_load, z_amount
from moe_train.routing.base import Router, RoutingConfig
from moe_train.routing.capacity import Group, Rounding, capacity_mask, capacity_of_shares, expert_capacity, group_tokens
from moe_train.routing.context import RoutingContext
from moe_train.routing.noise import mask_outputs
from moe_train.routing.types import RouterLoss, Routing, assignment_from_choices, count_choices, count_statistics

Normalise = Literal["none", "before_drop", "after_drop"]

# For k up to this, k calls of max are faster than topk (0.3 to 0.9 of its time on the CPU).
_MAX_K_BY_ARGMAX = 2


@dataclass(frozen=True)
class TokenChoiceConfig(RoutingConfig):
    """Keys of token-choice strategies. Below, T is the tokens of the capacity group, and E the experts.

    Attributes:
        balance_weight: coefficient of the balance loss, α in Switch.
        z_weight: coefficient of the z-loss, the mean of logsumexp(logits)² (ST-MoE).
        jitter: ε; in training the router's input is multiplied by U(1-ε, 1+ε).
        capacity_factor: an expert takes at most ceil(factor · k · T / E) tokens in training; None: all (dropless).
        evaluation_capacity_factor: the same at evaluation; a limit then makes an output depend on the other sentences
            in the batch.
        capacity_group: tokens that share a capacity: those of a ``rank`` or of the ``global`` micro-batch.
        batch_prioritised: tokens are served in order of the weight of their first choice, not in batch order.
        expert_output_masking: probability of dropping an expert's output (NLLB).
    """

    evaluation_keys: ClassVar[tuple[str, ...]] = ("evaluation_capacity_factor",)
    balance_weight: NonNegativeFloat = 0.01
    z_weight: NonNegativeFloat = 0.0
    jitter: Probability = 0.0
    capacity_factor: PositiveFloat | None = None
    evaluation_capacity_factor: PositiveFloat | None = None
    capacity_group: Group = "rank"
    batch_prioritised: bool = False
    expert_output_masking: Probability = 0.0


def check_top_k(top_k: int, available: int, what: str) -> None:
    """Raises ConfigError unless ``top_k <= available``; ``what`` describes ``available`` in the message."""
    if top_k > available:
        raise ConfigError(
            f"routing.top_k={top_k} is more than {what}, {available}",
            remedy=f"set routing.top_k to {available} or less",
        )


def best_experts(scores: Tensor, k: int) -> Tensor:
    """The k best columns [T, k] of each row of scores [T, E], the best first."""
    if k > _MAX_K_BY_ARGMAX:
        return scores.topk(k, dim=-1).indices
    found = [scores.max(dim=-1, keepdim=True).indices]
    while len(found) < k:
        scores = scores.scatter(1, found[-1], float("-inf"))
        found.append(scores.max(dim=-1, keepdim=True).indices)
    return torch.cat(found, dim=1)


def normalised(weights: Tensor, present: Tensor | None) -> Tensor:
    """Weights [T, k] divided by their sum per token; weights not ``present`` [T, k] count as 0 (None: all present)."""
    if present is not None:
        weights = weights * present
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)


@dataclass(frozen=True)
class RouterScores:
    """Logits of a router and the probabilities made from them.

    Attributes:
        logits: [T, E].
        probabilities: [T, E], used by the balance loss.
        counts: [k, E] int64, how often each expert is the first, the second … choice; None: not counted yet.
    """

    logits: Tensor
    probabilities: Tensor
    counts: Tensor | None = None


class TokenChoiceRouter(Router):
    """Base class of token-choice routers; ``forward`` ends with :meth:`build_routing`.

    Attributes:
        capacity_rounding: ``result``: an expert takes ceil(factor · k · T / E); ``share``: floor(factor · k ·
            ceil(T / E)).
    """

    config: TokenChoiceConfig
    capacity_rounding: Rounding = "result"

    def softmax_top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Softmax of logits [T, E], and the k best experts of each token, the best first.

        Returns:
            probabilities [T, E], weights [T, k], choices [T, k], and counts as in :class:`RouterScores`.
        """
        if self.kernels.uses_top_k(logits):
            return self.kernels.softmax_top_k(logits, k)
        probabilities = softmax(logits)
        if k == 1:
            return probabilities, *probabilities.max(dim=-1, keepdim=True), None
        choices = best_experts(probabilities.detach(), k)
        return probabilities, probabilities.gather(1, choices), choices, None

    def build_routing(
        self,
        scores: RouterScores,
        choices: Tensor,
        weights: Tensor,
        context: RoutingContext,
        normalise: Normalise = "none",
    ) -> Routing:
        """Applies capacity, and computes final weights, losses and statistics.

        Args:
            choices: [T, k] expert ids, -1 for no choice.
            weights: [T, k] combine weights before normalisation, also of skipped choices.
            normalise: ``before_drop`` divides by the sum over all k choices, including those skipped by
                :func:`~moe_train.routing.strategies.top_k.skip_second` or dropped by capacity; ``after_drop`` divides
                by the sum over the choices that are kept.
        """
        kept = self.kept_choices(choices, weights, context)
        if normalise == "before_drop":
            weights = normalised(weights, None)
        elif normalise == "after_drop":
            weights = normalised(weights, kept)
        if self.config.expert_output_masking:
            weights = mask_outputs(weights, self.config.expert_output_masking, context)
        counts = count_choices(choices, self.num_experts) if scores.counts is None else scores.counts
        requested = counts[0] if len(counts) == 1 else counts.sum(0)
        statistics = count_statistics(choices, kept, self.num_experts, scores.probabilities, requested=requested)
        # Only first choices count in the balance loss.
        losses = self.losses(scores, rank_load(counts[0], statistics.tokens)) if context.training else {}
        return Routing(
            assignment=assignment_from_choices(choices, weights, kept, context.fixed_size, statistics.load),
            choices=choices,
            kept=torch.ones_like(choices, dtype=torch.bool) if kept is None else kept,
            losses=losses,
            statistics=statistics,
        )

    def kept_choices(self, choices: Tensor, weights: Tensor, context: RoutingContext) -> Tensor | None:
        """Which choices are kept, [T, k]; None if all are."""
        config = self.config
        factor = config.capacity_factor if context.training else config.evaluation_capacity_factor
        if factor is None:
            return choices >= 0 if self.may_skip_choices(context) else None
        priority = weights[:, 0].detach() if config.batch_prioritised else None
        capacity = self.capacity(factor, choices, context)
        return capacity_mask(
            choices, capacity, self.num_experts, context, group=config.capacity_group, priority=priority
        )

    def capacity(self, factor: float, choices: Tensor, context: RoutingContext) -> Tensor:
        """0-dim: maximum number of (token, expert) pairs per expert, rounded according to ``capacity_rounding``."""
        tokens = group_tokens(choices, context, self.config.capacity_group)
        if self.capacity_rounding == "share":
            return capacity_of_shares(factor, tokens, choices.shape[1], self.num_experts)
        return expert_capacity(factor, tokens * choices.shape[1], self.num_experts)

    def may_skip_choices(self, context: RoutingContext) -> bool:
        """Whether choices can be -1."""
        return False

    def losses(self, scores: RouterScores, load: Tensor) -> Mapping[str, RouterLoss]:
        """The balance loss and the z-loss in training, if their weights are not 0.

        Args:
            load: [E + 1] int64, first choices of each expert, and the number of tokens.
        """
        config = self.config
        losses: dict[str, RouterLoss] = {}
        if config.balance_weight:
            losses["balance_loss"] = BalanceLoss(scores.probabilities.sum(0), load, config.balance_weight)
        if config.z_weight:
            losses["z_loss"] = MeanOverTokens(z_amount(scores.logits), load, config.z_weight)
        return losses
