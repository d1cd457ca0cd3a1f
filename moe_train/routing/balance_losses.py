"""Auxiliary losses of routers, and the one all-reduce over ranks that all losses of a forward share.

A router returns losses of which only this rank's part is known: sums over its tokens, with their graph, and counts.
:class:`WorldSums` sums the counts of all layers over the ranks; then ``share`` gives this rank's share of a loss. The
sum of the shares over the ranks is the loss of one process.

Reduced counts carry no gradient. So a share is linear in this rank's probabilities, and the sum of the gradients over
ranks is the gradient of one process. Without tokens losses are 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_train.routing.context import RankReduction
from moe_train.routing.types import RouterLoss


class WorldSums:
    """Sums over the ranks of all ``RouterLoss.sums`` of a forward. Every rank makes one at the same place.

    The all-reduce starts here and is waited for in the first :meth:`of`. Without losses there is none.
    """

    def __init__(self, losses: Iterable[RouterLoss], ranks: RankReduction) -> None:
        self._own = {id(own): own for loss in losses for own in loss.sums}
        if self._own:
            self._wait = ranks.start_sum(torch.cat(tuple(self._own.values())).to(torch.float64))

    def of(self, own: Tensor) -> Tensor:
        """The sum over the ranks, fp64, of a tensor of ``RouterLoss.sums``."""
        return self._totals[id(own)]

    @cached_property
    def _totals(self) -> dict[int, Tensor]:
        parts = self._wait().split([own.shape[0] for own in self._own.values()])
        return dict(zip(self._own, parts, strict=True))


def rank_load(counts: Tensor, tokens: Tensor) -> Tensor:
    """[E + 1] int64 of this rank: choices of each expert before drops [E], and the number of tokens, 0-dim."""
    return torch.cat((counts, tokens.view(1)))


def token_count(load: Tensor) -> Tensor:
    """0-dim: tokens of a load [E + 1], at least 1 to allow division."""
    return load[-1].clamp(min=1)


@dataclass(frozen=True)
class BalanceLoss:
    """``E · Σ_e f_e P_e`` (Fedus et al., 2022, Eq. 4), which is 1 if f and P are uniform.

    Attributes:
        probabilities: [E] summed over this rank's tokens; P_e is their mean over the tokens of all ranks.
        load: :func:`rank_load`; f_e is the fraction of the tokens of all ranks that chose e.
        weight: coefficient in the objective.
    """

    probabilities: Tensor
    load: Tensor
    weight: float

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The load."""
        return (self.load,)

    def fraction(self, load: Tensor) -> Tensor:
        """f [E] from the load of all ranks."""
        return load[:-1] / token_count(load)

    def share(self, world: WorldSums) -> Tensor:
        """See :class:`~moe_train.routing.types.RouterLoss`."""
        load = world.of(self.load)
        scale = self.fraction(load) * (self.probabilities.shape[0] / token_count(load))
        return (self.probabilities * scale.to(self.probabilities.dtype)).sum()


@dataclass(frozen=True)
class MeanOverTokens:
    """The mean over the tokens of all ranks of an amount.

    Attributes:
        amount: 0-dim, summed over this rank's tokens.
        load: :func:`rank_load`.
        weight: coefficient in the objective.
    """

    amount: Tensor
    load: Tensor
    weight: float

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The load."""
        return (self.load,)

    def share(self, world: WorldSums) -> Tensor:
        """See :class:`~moe_train.routing.types.RouterLoss`."""
        return self.amount / token_count(world.of(self.load)).to(self.amount.dtype)


def z_amount(logits: Tensor) -> Tensor:
    """``Σ_t logsumexp(logits_t)²`` of logits [T, E]; the z-loss is its mean (ST-MoE, Zoph et al., 2022, Eq. 5)."""
    return torch.logsumexp(logits, dim=-1).square().sum()


@dataclass(frozen=True)
class SquaredVariation:
    """``(std / mean)²`` over experts of the amounts summed over ranks; 0 if all are equal (V-MoE, §A.2).

    The loss is not linear in a rank's amounts. So a share has the gradient of the whole loss with respect to this
    rank's amounts, and as its value the whole loss times this rank's fraction of the tokens.

    Attributes:
        amounts: [E] of this rank, differentiable.
        own: [E + 1] fp64, the amounts, and the number of this rank's tokens.
        weight: coefficient in the objective.
    """

    amounts: Tensor
    own: Tensor
    weight: float

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """Amounts and tokens."""
        return (self.own,)

    def share(self, world: WorldSums) -> Tensor:
        """See :class:`~moe_train.routing.types.RouterLoss`."""
        reduced, experts = world.of(self.own), self.amounts.shape[0]
        total = reduced[:-1]
        # Without tokens the sum is 0; the clamp keeps its cube above 0 in fp64.
        whole, squares = total.sum().clamp(min=1e-60), total.square().sum()
        value = (experts * squares / whole**2 - 1) * (self.own[-1] / token_count(reduced))
        slope = 2 * experts * (total / whole**2 - squares / whole**3)
        share = (self.amounts * slope.to(self.amounts.dtype)).sum()
        return share - share.detach() + value.to(self.amounts.dtype)


def squared_variation(amounts: Tensor, tokens: int, weight: float) -> SquaredVariation:
    """The loss on the variation of amounts [E] of this rank, which has that many tokens."""
    count = torch.full((1,), float(tokens), dtype=torch.float64, device=amounts.device)
    return SquaredVariation(amounts, torch.cat((amounts.detach().to(torch.float64), count)), weight)


def selection_probability(logits: Tensor, noisy: Tensor, k: int, std: float) -> Tensor:
    """[T, E]: probability that each expert is among the k best if only its own noise is redrawn (V-MoE, §A.2).

    Args:
        logits, noisy: [T, E], without and with noise N(0, std²).
    """
    threshold = noisy.topk(k, dim=-1).values[:, -1:]
    chance: Tensor = torch.special.ndtr((logits - threshold) / std)
    return chance
