"""Return types of routers. Shapes: T tokens (without padding), P pairs, k choices, E experts.

Every strategy computes an :class:`Assignment`; the expert pool then computes
``y_t = Σ over pairs (t, e, w) of w · f_e(x_t)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_train.routing.balance_losses import WorldSums


@dataclass(frozen=True)
class Assignment:
    """Pairs of a token and an expert. The layer adds 0 to tokens without a pair.

    Attributes:
        token: [P] int64, row of x.
        expert: [P] int64, global expert id.
        weight: [P] fp32, differentiable.
        load: [E] int64, pairs of each expert; None: not counted yet.
        per_token: k if the pairs are those of token 0, then those of token 1 …, k each; 0: not known.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    load: Tensor | None = field(default=None, kw_only=True)
    per_token: int = field(default=0, kw_only=True)


class RouterLoss(Protocol):
    """An auxiliary loss as a router returns it, before sums over the ranks are known.

    Attributes:
        weight: coefficient in the objective.
        sums: vectors of this rank, without gradient, whose sums over the ranks :meth:`share` needs; always the same
            tensors.
    """

    @property
    def weight(self) -> float:
        """See the class."""

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """See the class."""

    def share(self, world: WorldSums) -> Tensor:
        """0-dim, this rank's share: the sum over the ranks that share the micro-batch is the loss of one process, for
        gradients too. ``world`` has the sums over the ranks.
        """


@dataclass(frozen=True)
class AuxiliaryLoss:
    """An auxiliary loss whose ``value`` is known: this rank's share (:meth:`RouterLoss.share`), 0-dim fp32.

    A router whose loss needs no sums over ranks may return one. ``weight`` is the coefficient in the objective.
    """

    value: Tensor
    weight: float

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """None are needed."""
        return ()

    def share(self, world: WorldSums) -> Tensor:
        """The value."""
        return self.value


@dataclass(frozen=True)
class RoutingStatistics:
    """Additive counts (sums over this rank's tokens, no gradient), so that ranks and micro-batches can be summed.

    Attributes:
        load: [E] pairs kept per expert.
        requested: [E] pairs chosen per expert, including dropped ones.
        tokens: 0-dim, number of tokens routed.
        entropy: 0-dim, summed over tokens, in nats (0 if the strategy has no distribution).
        extra: further additive counts of a strategy by name; logs show them divided by ``tokens``.
    """

    load: Tensor
    requested: Tensor
    tokens: Tensor
    entropy: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def dropped(self) -> Tensor:
        """0-dim: number of dropped pairs."""
        return self.requested.sum() - self.load.sum()


@dataclass(frozen=True)
class Routing:
    """Output of a router.

    Attributes:
        assignment: the pairs to compute.
        choices: [T, k] expert ids before drops (-1: no choice), used for priority, SMoE's next stratum and the
            fluctuation analysis.
        kept: [T, k] bool, False if the choice was dropped.
        losses: by name, for example ``balance_loss``; empty at evaluation.
        statistics: counts for the log, for balancing and for analysis.
    """

    assignment: Assignment
    choices: Tensor
    kept: Tensor
    losses: Mapping[str, RouterLoss]
    statistics: RoutingStatistics


def count_per_expert(ids: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how often each expert occurs in ``ids`` (any shape); -1 is not counted. No host sync."""
    ids = ids.reshape(-1) + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))[1:]


def count_choices(choices: Tensor, num_experts: int) -> Tensor:
    """[k, E] int64: how often each expert is the first, the second … choice; -1 is not counted. No host sync.

    Args:
        choices: [T, k].
    """
    ids = choices.t() + 1
    counts = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids))[:, 1:]


def entropy_sum(probabilities: Tensor) -> Tensor:
    """0-dim: Σ -p log p, in nats. (``torch.special.entr`` takes six times as long on the CPU.)"""
    p = probabilities.reshape(-1)
    return -torch.dot(p, p.clamp(min=torch.finfo(p.dtype).tiny).log_())


def assignment_from_choices(
    choices: Tensor, weights: Tensor, kept: Tensor | None = None, fixed_size: bool = False, load: Tensor | None = None
) -> Assignment:
    """Pairs from a token's choices.

    Args:
        choices: [T, k] expert ids.
        weights: [T, k] fp32.
        kept: [T, k] bool, False wherever the id is negative; None: all choices are kept (shapes are static and no host
            sync is needed).
        fixed_size: choices that are not kept become pairs with expert -1, which also needs no host sync.
        load: [E] int64, kept choices of each expert, if they have been counted.
    """
    tokens, k = choices.shape
    if kept is None or fixed_size:
        token = torch.arange(tokens * k, device=choices.device)
        token = token if k == 1 else token // k
        expert = choices if kept is None else torch.where(kept, choices, -1)
        return Assignment(token, expert.reshape(-1), weights.reshape(-1), load=load, per_token=k)
    pair = kept.reshape(-1).nonzero().squeeze(1)
    expert, weight = (value.reshape(-1)[pair] for value in (choices, weights))
    return Assignment(pair // k, expert, weight, load=load)


def count_statistics(
    choices: Tensor,
    kept: Tensor | None,
    num_experts: int,
    probabilities: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    requested: Tensor | None = None,
) -> RoutingStatistics:
    """The statistics of a token-choice router from choices [T, k] (-1: none), kept [T, k] and probabilities [T, E].

    ``requested`` [E]: how often each expert is chosen, if it has been counted.
    """
    with torch.no_grad():
        requested = count_per_expert(choices, num_experts) if requested is None else requested
        load = requested if kept is None else count_per_expert(torch.where(kept, choices, -1), num_experts)
        entropy = torch.zeros((), device=choices.device) if probabilities is None else entropy_sum(probabilities)
        tokens = torch.full((), choices.shape[0], device=choices.device)  # torch.tensor would wait for a GPU
        return RoutingStatistics(load, requested, tokens, entropy, dict(extra or {}))
