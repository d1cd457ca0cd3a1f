"""``routing=expert_choice``: experts choose tokens (Zhou et al., NeurIPS 2022, arXiv 2202.09368).

``S = softmax(X W)`` over experts; each expert takes the C tokens with the highest ``S[:, e]``, ``C = c · T / E``, and
``y_t = Σ over the experts that chose t of S[t, e] f_e(x_t)``. Loads are equal by construction, so there is no auxiliary
loss; a token may be chosen by no expert or by all. A token's experts depend on later tokens, so decoders reject it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_train.config.check import NonNegativeFloat, PositiveFloat
from moe_train.kernels.cpu.gate_scores import softmax
from moe_train.routing.all_gather import all_gather_rows, world_order
from moe_train.routing.base import Router, RouterInputs, RoutingConfig
from moe_train.routing.capacity import Group, shared_by_ranks
from moe_train.routing.context import RoutingContext
from moe_train.routing.expected_load import ExpectedChoices
from moe_train.routing.gate import LinearGate, linear_init
from moe_train.routing.noise import score_noise
from moe_train.routing.registry import register
from moe_train.routing.types import Routing, assignment_from_choices, count_statistics

HalfRounding = Literal["half_up", "half_even"]


@dataclass(frozen=True)
class ExpertChoiceConfig(RoutingConfig):
    """Keys of expert choice.

    Attributes:
        capacity_factor: c, mean number of experts per token.
        scope: the tokens that an expert chooses from: those of a ``sentence``, or of the ``batch`` (as in the paper;
            outputs then depend on the other sentences of the batch).
        capacity_rounding: rounding of halves in c · T / E: ``half_up``, or ``half_even`` as in V-MoE's code.
        score_noise: in training N(0, (score_noise / E)²) is added to the logits (V-MoE's code: 1).
        capacity_group: the batch: a ``rank``'s tokens or the ``global`` micro-batch.
    """

    name: str = "expert_choice"
    capacity_factor: PositiveFloat = 2.0
    scope: Literal["sentence", "batch"] = "sentence"
    capacity_group: Group = "rank"
    capacity_rounding: HalfRounding = "half_up"
    score_noise: NonNegativeFloat = 0.0


@register("expert_choice", ExpertChoiceConfig)
class ExpertChoiceRouter(Router):
    """Each expert chooses its C best tokens."""

    causal: ClassVar[bool] = False

    def __init__(self, config: ExpertChoiceConfig, inputs: RouterInputs) -> None:
        super().__init__(config, inputs)
        self.config: ExpertChoiceConfig = config
        self.gate = LinearGate(inputs.dim, config.num_experts, linear_init)

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Routes x [T, d]. ``choices`` has E columns, best first, filled with -1."""
        logits = self.gate(x)
        if self.config.score_noise:
            logits = score_noise(logits, self.config.score_noise, context)
        scores = softmax(logits)
        chosen = self.chosen(scores.detach(), context)
        _, experts = torch.where(chosen, scores.detach(), -1.0).sort(dim=-1, descending=True, stable=True)
        kept = chosen.gather(1, experts)
        choices = torch.where(kept, experts, -1)
        statistics = count_statistics(choices, None, self.num_experts, scores)
        return Routing(
            assignment=assignment_from_choices(experts, scores.gather(1, experts), kept, load=statistics.load),
            choices=choices,
            kept=kept,
            losses={},
            statistics=statistics,
        )

    def chosen(self, scores: Tensor, context: RoutingContext) -> Tensor:
        """[T, E] bool: which expert has chosen which token."""
        factor, rounding = self.config.capacity_factor, self.config.capacity_rounding
        if self.config.scope == "sentence":
            return choose_tokens(scores, context.sentence, context.num_sentences, factor, rounding)
        if not shared_by_ranks(context, self.config.capacity_group):
            return choose_tokens(scores, torch.zeros_like(context.sentence), 1, factor, rounding)
        world = world_order(context)
        all_scores, _ = all_gather_rows(scores, context.ranks)
        ordered = choose_tokens(all_scores[world.order], torch.zeros_like(world.order), 1, factor, rounding)
        chosen = torch.empty_like(ordered)
        chosen[world.order] = ordered
        return chosen[world.own]

    @classmethod
    def experts_per_token(cls, config: RoutingConfig) -> float:
        """c, apart from the rounding of C and from short sentences."""
        assert isinstance(config, ExpertChoiceConfig)
        return min(config.capacity_factor, float(config.num_experts))

    @classmethod
    def expected_choices(cls, config: RoutingConfig) -> tuple[ExpectedChoices, ...]:
        """Each expert takes c / E of the tokens, independently of the others."""
        return (ExpectedChoices(1.0, 0, config.num_experts, cls.experts_per_token(config), independent=True),)


def choose_tokens(
    scores: Tensor, group: Tensor, num_groups: int, factor: float, rounding: HalfRounding = "half_up"
) -> Tensor:
    """Each expert's best tokens within each group of tokens.

    Args:
        scores: [T, E].
        group: [T] int64, non-decreasing, in 0 .. num_groups - 1.
        factor: an expert takes ``factor · T_g / E`` tokens of a group of T_g, rounded, at least 1 and at most T_g.
        rounding: rounding of halves.

    Returns:
        [T, E] bool. Of tokens with equal scores the earlier one is chosen.
    """
    sizes = group.new_zeros(num_groups).scatter_add(0, group, torch.ones_like(group))
    column = torch.arange(scores.shape[0], device=group.device) - (sizes.cumsum(0) - sizes)[group]
    longest = int(sizes.max()) if num_groups else 0
    table = scores.new_full((num_groups, scores.shape[1], longest), float("-inf"))
    table[group, :, column] = scores
    order = table.argsort(dim=2, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(2, order, torch.arange(longest, device=group.device).expand_as(order))
    wanted = factor * sizes.to(torch.float64) / scores.shape[1]
    capacity = wanted.round() if rounding == "half_even" else torch.floor(wanted + 0.5)
    return place[group, :, column] < capacity.clamp(min=1)[group].unsqueeze(1)
