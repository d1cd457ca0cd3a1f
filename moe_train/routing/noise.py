"""Noise of routers, from counter-based random numbers, in training only. Call it only with an amount above 0."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.context import RoutingContext
from moe_train.routing.counter_rng import counter_uniform

# Streams distinguish the draws of one router. Do not renumber: old runs would not be reproducible.
JITTER, GUMBEL, SECOND_EXPERT, OUTPUT_MASK, SCORE_NOISE, EXPERT, PARTNER = range(1, 8)


def jitter(x: Tensor, amount: float, context: RoutingContext) -> Tensor:
    """x [T, d] times U(1 - amount, 1 + amount), in training only (Switch, Mesh TensorFlow)."""
    if not context.training:
        return x
    draw = counter_uniform(context, JITTER, x.shape[1])
    return x * (1 - amount + 2 * amount * draw).to(x.dtype)


def gumbel(context: RoutingContext, width: int) -> Tensor:
    """fp64 standard Gumbel noise, [T, width]."""
    draw = counter_uniform(context, GUMBEL, width).clamp(min=torch.finfo(torch.float64).tiny)
    return -torch.log(-torch.log(draw))


def score_noise(logits: Tensor, amount: float, context: RoutingContext) -> Tensor:
    """Logits [T, E] plus N(0, (amount / E)²), in training only (V-MoE, Riquelme et al., 2021: 1 / E)."""
    if not context.training:
        return logits
    draw = counter_uniform(context, SCORE_NOISE, logits.shape[1]).clamp(min=torch.finfo(torch.float64).eps)
    noise: Tensor = torch.special.ndtri(draw) * (amount / logits.shape[1])
    return logits + noise.to(logits.dtype)


def mask_outputs(weights: Tensor, probability: float, context: RoutingContext) -> Tensor:
    """Expert-output masking (NLLB Team, 2022, §6.2.1): drops each (token, expert) output with ``probability``.

    As published, there is no rescaling in training; at evaluation outputs are scaled by ``1 - probability``.

    Args:
        weights: [T, k].
    """
    if not context.training:
        return weights * (1 - probability)
    survives = counter_uniform(context, OUTPUT_MASK, weights.shape[1]) >= probability
    return weights * survives.to(weights.dtype)
