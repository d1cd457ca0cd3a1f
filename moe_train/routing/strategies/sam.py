"""``routing=sam``: switch and mixture routing (SAM, Jiang et al., 2021, arXiv 2110.07431).

Experts form G groups of E/G. A switch router picks one group per token, a mixture router picks k experts inside it, so
that all k are on one device and communication does not grow with k. There is no public official code; the equations
follow the paper's abstract and a third-party implementation (docs/strategies.md gives the source of each):

    shared matrix: p = softmax(W x + b) over all E, P_g = Σ_{e in g} p_e          weight of e: p_e
    two matrices:  P = softmax(W_s x) over groups, q = softmax(W_m x) inside g    weight of e: P_g q_e
    g* = argmax P,  S = top-k of p inside g*,  y = Σ_{e in S} p_e f_e(x)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_train.config.check import NonNegativeFloat, PositiveFloat
from moe_train.errors import ConfigError
from moe_train.kernels.cpu.gate_scores import softmax
from moe_train.routing.balance_losses import BalanceLoss, MeanOverTokens, rank_load, z_amount
from moe_train.routing.base import ExpertCount, ExpertPlacement, RouterInputs, RoutingConfig
from moe_train.routing.capacity import capacity_mask, expert_capacity, group_tokens
from moe_train.routing.context import RoutingContext
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.gate import LinearGate, linear_init, scores_of_gates
from moe_train.routing.noise import jitter
from moe_train.routing.registry import register
from moe_train.routing.token_choice import RouterScores, TokenChoiceConfig, TokenChoiceRouter, best_experts, check_top_k
from moe_train.routing.types import RouterLoss, Routing


@dataclass(frozen=True)
class SamConfig(TokenChoiceConfig):
    """Keys in addition to those of all token-choice strategies.

    Attributes:
        top_k: k, experts per token, all in one group.
        num_groups: G, a property of the model; ``rank`` and ``node`` are replaced by their number at the first launch.
        matrices: ``shared`` or ``two``.
        group_balance_weight: weight of the balance loss over groups.
        alignment_weight: weight of the loss on experts outside the group with a higher probability than a chosen one.
        alignment_gradient: ``outside`` treats the lowest chosen probability as a constant; ``both`` raises it too.
        group_capacity_factor: a group takes at most ceil(factor · T / G) tokens in training; None: all.
    """

    layout_keys: ClassVar[tuple[str, ...]] = ("num_groups",)
    name: str = "sam"
    top_k: ExpertCount = 2
    num_groups: ExpertCount | Literal["rank", "node"] = 4
    matrices: Literal["shared", "two"] = "shared"
    group_balance_weight: NonNegativeFloat = 0.01
    alignment_weight: NonNegativeFloat = 0.01
    alignment_gradient: Literal["outside", "both"] = "outside"
    group_capacity_factor: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_groups, int):
            if self.num_experts % self.num_groups:
                raise ConfigError(
                    f"routing.num_groups={self.num_groups} does not divide routing.num_experts={self.num_experts}",
                    remedy="choose a number of groups that divides the experts",
                )
            check_top_k(
                self.top_k, self.group_size, "the experts of a group (routing.num_experts / routing.num_groups)"
            )

    def layout_warning(self, placement: ExpertPlacement) -> str | None:
        """A warning if a group is split over ranks, so that a token may be sent to several ranks."""
        return placement.split_groups(self.num_experts, self.groups)

    @property
    def groups(self) -> int:
        """G.

        Raises:
            ConfigError: it is still ``rank`` or ``node``.
        """
        if isinstance(self.num_groups, int):
            return self.num_groups
        raise ConfigError(
            f"routing.num_groups={self.num_groups} has no number yet", remedy="set routing.num_groups to a number"
        )

    @property
    def expert_groups(self) -> int:
        """G."""
        return self.groups

    @property
    def group_size(self) -> int:
        """E / G."""
        return self.num_experts // self.groups


@dataclass(frozen=True)
class Levels:
    """Attributes:
    expert: [T, E] probabilities of all experts, which sum to 1.
    group: [T, G] probabilities of the groups.
    logits: inputs of the z-loss, one tensor per softmax.
    """

    expert: Tensor
    group: Tensor
    logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class GroupBalanceLoss(BalanceLoss):
    """The balance loss over G groups: ``probabilities`` [G] are theirs, ``load`` counts ``picks`` experts per token."""

    picks: int = 1

    def fraction(self, load: Tensor) -> Tensor:
        """f [G]."""
        return super().fraction(load).view(self.probabilities.shape[0], -1).sum(-1) / self.picks


@register("sam", SamConfig)
class SamRouter(TokenChoiceRouter):
    """One group per token, k experts inside it."""

    def __init__(self, config: SamConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: SamConfig = config
        self.groups, self.group_size = config.groups, config.group_size
        if config.matrices == "shared":
            self.gate = LinearGate(inputs.dim, config.num_experts, nn.init.xavier_uniform_, bias=True)
        else:
            self.switch = LinearGate(inputs.dim, self.groups, linear_init)
            self.mixture = LinearGate(inputs.dim, config.num_experts, linear_init)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]."""
        if self.config.jitter:
            x = jitter(x, self.config.jitter, context)
        levels = self.levels(x)
        group = levels.group.detach().argmax(dim=-1, keepdim=True)
        inside = self.by_group(levels.expert.detach()).gather(1, group.unsqueeze(2).expand(-1, 1, self.group_size))
        best = best_experts(inside.squeeze(1), self.config.top_k)
        choices = group * self.group_size + best
        weights = levels.expert.gather(1, choices)
        routing = self.build_routing(RouterScores(levels.logits[0], levels.expert), choices, weights, context)
        if not context.training:
            return routing
        load = rank_load(routing.statistics.requested, routing.statistics.tokens)
        return dataclasses.replace(routing, losses=self.level_losses(levels, choices, weights, load))

    def by_group(self, per_expert: Tensor) -> Tensor:
        """[T, E] as [T, G, E/G]."""
        return per_expert.view(per_expert.shape[0], self.groups, self.group_size)

    def levels(self, x: Tensor) -> Levels:
        """Probabilities of experts and groups of x [T, d]."""
        if self.config.matrices == "shared":
            logits = self.gate(x)
            expert = softmax(logits)
            return Levels(expert, self.by_group(expert).sum(-1), (logits,))
        switch, mixture = scores_of_gates((self.switch, self.mixture), x)
        group = softmax(switch)
        inside = softmax(self.by_group(mixture))
        return Levels((group.unsqueeze(2) * inside).flatten(1), group, (switch, mixture))

    def kept_choices(self, choices: Tensor, weights: Tensor, context: RoutingContext) -> Tensor | None:
        """Applies the groups' capacity, which drops all choices of a token, and then the experts' capacity."""
        factor = self.config.group_capacity_factor
        if factor is None or not context.training:
            return super().kept_choices(choices, weights, context)
        share = self.config.capacity_group
        capacity = expert_capacity(factor, group_tokens(choices, context, share), self.groups)
        priority = weights.sum(-1).detach() if self.config.batch_prioritised else None
        group = choices[:, :1] // self.group_size
        entered = capacity_mask(group, capacity, self.groups, context, group=share, priority=priority)
        left = torch.where(entered, choices, -1)
        kept = super().kept_choices(left, weights, context)
        return entered.expand_as(choices) if kept is None else kept

    def losses(self, scores: RouterScores, load: Tensor) -> Mapping[str, RouterLoss]:
        """None; :meth:`level_losses` computes them, since it needs more than the scores."""
        return {}

    def level_losses(self, levels: Levels, choices: Tensor, weights: Tensor, load: Tensor) -> Mapping[str, RouterLoss]:
        """Balance loss of experts (k if uniform), balance loss of groups (1 if uniform), alignment loss, z-loss."""
        config = self.config
        outside = alignment(levels.expert, choices, weights, self.group_size, both=config.alignment_gradient == "both")
        found: dict[str, RouterLoss] = {
            "balance_loss": BalanceLoss(levels.expert.sum(0), load, config.balance_weight),
            "group_balance_loss": GroupBalanceLoss(
                levels.group.sum(0), load, config.group_balance_weight, config.top_k
            ),
            "alignment_loss": MeanOverTokens(outside.sum(), load, config.alignment_weight),
        }
        if config.z_weight:
            amounts = torch.stack([z_amount(logits) for logits in levels.logits])
            found["z_loss"] = MeanOverTokens(amounts.sum(), load, config.z_weight)
        return {name: loss for name, loss in found.items() if loss.weight}

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """k."""
        assert isinstance(config, SamConfig)
        return float(config.top_k)

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """One group, then k experts inside it."""
        assert isinstance(config, SamConfig)
        size, share = config.group_size, 1.0 / config.groups
        return tuple(ExpectedChoices(share, g * size, size, config.top_k) for g in range(config.groups))

    @classmethod
    def router_flops_per_token(cls, config: RoutingConfig, dim: int) -> float:
        """One matrix over the experts, and another over the groups in the two-matrix form."""
        assert isinstance(config, SamConfig)
        return 2.0 * dim * (config.num_experts + (config.groups if config.matrices == "two" else 0))


def alignment(expert: Tensor, choices: Tensor, weights: Tensor, group_size: int, *, both: bool) -> Tensor:
    """[T]: Σ over experts outside the chosen group of max(0, p_e - p_(k)), with p_(k) the lowest chosen probability.

    Args:
        expert: [T, E] probabilities.
        choices, weights: [T, k], the chosen experts and their probabilities.
        both: whether p_(k) has a gradient too.
    """
    weakest = weights.amin(dim=-1, keepdim=True)
    if not both:
        weakest = weakest.detach()
    by_group = expert.unflatten(1, (-1, group_size))
    chosen = (choices[:, :1] // group_size).unsqueeze(2).expand(-1, 1, group_size)
    outside = by_group.scatter(1, chosen, 0.0).flatten(1)
    return torch.relu(outside - weakest).sum(-1)
