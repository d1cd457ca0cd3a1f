"""Auxiliary losses of routers. Each value is this rank's share: their sum over the ranks is the loss of one process.

Fractions and token counts are reduced over the ranks first; they carry no gradient, so that the share is linear in this
rank's own probabilities and the gradients sum up as well. No tokens at all give 0.
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
    fraction: [E] fp64, choices of it per token of the world (0 where there is no token).
    tokens: 0-dim fp64, the world's tokens, at least 1 so that one may divide by it.
    """

    fraction: Tensor
    tokens: Tensor


def world_load(choices: Tensor, num_experts: int, ranks: RankReduction) -> WorldLoad:
    """Reduces over the ranks who was chosen, before drops.

    Args:
        choices: [T] or [T, k]; -1 is no choice, of a token that counts all the same.
    """
    counts = count_per_expert(choices.detach(), num_experts)
    own = torch.full((1,), choices.shape[0], device=counts.device)
    total = ranks.sum(torch.cat((counts, own))).to(torch.float64)
    tokens = total[-1].clamp(min=1)
    return WorldLoad(total[:-1] / tokens, tokens)


def balance_loss(probabilities: Tensor, load: WorldLoad) -> Tensor:
    """Share of ``E · Σ_e f_e P_e`` (Fedus et al., 2022, Eq. 4), 1 where both are uniform.

    Args:
        probabilities: [T, E] of this rank; P_e is their mean over the world's tokens.
        load: f, from :func:`world_load`.
    """
    scale = load.fraction * (probabilities.shape[1] / load.tokens)
    return (probabilities.sum(0) * scale.to(probabilities.dtype)).sum()


def squared_variation(amounts: Tensor, tokens: int, ranks: RankReduction) -> Tensor:
    """Share of ``(std / mean)²`` over experts of amounts summed over the world, 0 where all are equal (V-MoE, §A.2).

    It is not linear in a rank's amounts: the share has the gradient of the whole by them, and the value of the whole
    times the rank's share of tokens.

    Args:
        amounts: [E] of this rank, with their gradient.
        tokens: of this rank.
    """
    experts = amounts.shape[0]
    own = torch.full((1,), float(tokens), dtype=torch.float64, device=amounts.device)
    reduced = ranks.sum(torch.cat((amounts.detach().to(torch.float64), own)))
    total, everyone = reduced[:-1], reduced[-1].clamp(min=1)
    whole, squares = total.sum().clamp(min=1e-60), total.square().sum()  # without tokens 0, and its cube still above 0
    value = (experts * squares / whole**2 - 1) * (tokens / everyone)
    slope = 2 * experts * (total / whole**2 - squares / whole**3)
    share = (amounts * slope.to(amounts.dtype)).sum()
    return share - share.detach() + value.to(amounts.dtype)


def chance_of_choice(logits: Tensor, noisy: Tensor, k: int, std: float) -> Tensor:
    """[T, E]: how likely each expert is among the k best if its noise alone were drawn anew (V-MoE, §A.2).

    Args:
        logits, noisy: [T, E], without and with the noise N(0, std²).
    """
    threshold = noisy.topk(k, dim=-1).values[:, -1:]
    chance: Tensor = torch.special.ndtr((logits - threshold) / std)
    return chance


def z_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Share of the mean over tokens of ``logsumexp(logits)²`` (ST-MoE, Zoph et al., 2022, Eq. 5)."""
    return torch.logsumexp(logits, dim=-1).square().sum() / tokens.to(logits.dtype)
