"""Auxiliary losses of routers. Each value is this rank's share: the sum over the ranks is the loss of one process.

Fractions and token counts are reduced over the ranks first and carry no gradient. So the share is linear in this rank's
probabilities, and the sum of the gradients over ranks is the gradient of one process. Without tokens losses are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.context import RankReduction
from moe_train.routing.types import count_per_expert


@dataclass(frozen=True)
class WorldLoad:
    """Attributes:
    fraction: [E] fp64, choices of each expert divided by the tokens of all ranks (0 without tokens).
    tokens: 0-dim fp64, tokens of all ranks, at least 1 to allow division.
    """

    fraction: Tensor
    tokens: Tensor


def world_load(choices: Tensor, num_experts: int, ranks: RankReduction) -> WorldLoad:
    """Load of each expert before drops, reduced over the ranks.

    Args:
        choices: [T] or [T, k]; -1: no choice (the token is counted nevertheless).
    """
    counts = count_per_expert(choices.detach(), num_experts)
    own = torch.full((1,), choices.shape[0], device=counts.device)
    total = ranks.sum(torch.cat((counts, own))).to(torch.float64)
    tokens = total[-1].clamp(min=1)
    return WorldLoad(total[:-1] / tokens, tokens)


def balance_loss(probabilities: Tensor, load: WorldLoad) -> Tensor:
    """Share of ``E · Σ_e f_e P_e`` (Fedus et al., 2022, Eq. 4), which is 1 if f and P are uniform.

    Args:
        probabilities: [T, E] of this rank; P_e is their mean over the tokens of all ranks.
        load: f, from :func:`world_load`.
    """
    scale = load.fraction * (probabilities.shape[1] / load.tokens)
    return (probabilities.sum(0) * scale.to(probabilities.dtype)).sum()


def squared_variation(amounts: Tensor, tokens: int, ranks: RankReduction) -> Tensor:
    """Share of ``(std / mean)²`` over experts of the amounts summed over ranks; 0 if all are equal (V-MoE, §A.2).

    The loss is not linear in a rank's amounts. So the returned share has the gradient of the whole loss with respect
    to this rank's amounts, and as its value the whole loss times this rank's fraction of the tokens.

    Args:
        amounts: [E] of this rank, differentiable.
        tokens: number of tokens of this rank.
    """
    experts = amounts.shape[0]
    own = torch.full((1,), float(tokens), dtype=torch.float64, device=amounts.device)
    reduced = ranks.sum(torch.cat((amounts.detach().to(torch.float64), own)))
    total, all_tokens = reduced[:-1], reduced[-1].clamp(min=1)
    # Without tokens the sum is 0; the clamp keeps its cube above 0 in fp64.
    whole, squares = total.sum().clamp(min=1e-60), total.square().sum()
    value = (experts * squares / whole**2 - 1) * (tokens / all_tokens)
    slope = 2 * experts * (total / whole**2 - squares / whole**3)
    share = (amounts * slope.to(amounts.dtype)).sum()
    return share - share.detach() + value.to(amounts.dtype)


def selection_probability(logits: Tensor, noisy: Tensor, k: int, std: float) -> Tensor:
    """[T, E]: probability that each expert is among the k best if only its own noise is redrawn (V-MoE, §A.2).

    Args:
        logits, noisy: [T, E], without and with noise N(0, std²).
    """
    threshold = noisy.topk(k, dim=-1).values[:, -1:]
    chance: Tensor = torch.special.ndtr((logits - threshold) / std)
    return chance


def z_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of the mean over tokens of ``logsumexp(logits)²`` (ST-MoE, Zoph et al., 2022, Eq. 5)."""
    return torch.logsumexp(logits, dim=-1).square().sum() / tokens.to(logits.dtype)
