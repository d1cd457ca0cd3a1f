"""Capacity: how many tokens an expert takes, who comes first, and what is dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.routing.context import RoutingContext
from moe_train.routing.world import gather_rows, world_order


def places_in_queue(queue: Tensor, num_experts: int) -> Tensor:
    """Each entry's number among the earlier entries of the same expert.

    Args:
        queue: [Q] int64 expert ids in the order of service; negative ids are in no queue (their place means nothing).

    Returns:
        [Q] int64, 0 for the first that an expert serves.
    """
    ids = torch.where(queue < 0, num_experts, queue)
    ordered, permutation = torch.sort(ids, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=queue.device))
    places = torch.empty_like(queue)
    places[permutation] = torch.arange(queue.numel(), device=queue.device) - starts[ordered]
    return places


def serve(choices: Tensor, order: Tensor, capacity: Tensor | float, num_experts: int) -> Tensor:
    """Which choices are within capacity: all first choices come before all second ones (GShard, §2.2).

    Args:
        choices: [T, k] expert ids, -1 for no choice.
        order: [T] int64, the tokens in the order of service.
        capacity: pairs that each expert takes.

    Returns:
        [T, k] bool.
    """
    tokens, k = choices.shape
    queue = choices[order].t().reshape(-1)
    served = (places_in_queue(queue, num_experts) < capacity) & (queue >= 0)
    kept = torch.empty_like(choices, dtype=torch.bool)
    kept[order] = served.view(k, tokens).t()
    return kept


def expert_capacity(factor: float, pairs: Tensor | int, num_experts: int) -> Tensor:
    """0-dim: ``ceil(factor · pairs / E)``, where ``pairs`` is k·T; at least 1."""
    pairs = torch.as_tensor(pairs, dtype=torch.float64)
    return torch.ceil(factor * pairs / num_experts).clamp(min=1)


def service_order(priority: Tensor | None, order: Tensor) -> Tensor:
    """``order`` [T], resorted so that a higher ``priority`` [T] comes first (batch-prioritised routing, V-MoE §3.4)."""
    if priority is None:
        return order
    return order[torch.argsort(priority[order], descending=True, stable=True)]


def drop(
    choices: Tensor,
    factor: float,
    num_experts: int,
    context: RoutingContext,
    *,
    group: str = "rank",
    priority: Tensor | None = None,
) -> Tensor:
    """The choices that fit, [T, k] bool.

    Args:
        choices: [T, k] expert ids, -1 for no choice.
        factor: capacity factor: an expert takes ``ceil(factor · k · T / E)`` pairs.
        group: ``rank`` (each rank's tokens share a capacity of their own) or ``global`` (the whole micro-batch does,
            with the same outcome on any number of ranks).
        priority: [T], higher is served first; None: in the order of the batch.
    """
    k = choices.shape[1]
    if group == "rank":
        capacity = expert_capacity(factor, choices.numel(), num_experts)
        order = torch.arange(choices.shape[0], device=choices.device)
        return serve(choices, service_order(priority, order), capacity.to(choices.device), num_experts)
    world = world_order(context)
    everyone, _ = gather_rows(choices, context.ranks)
    scores = None if priority is None else gather_rows(priority.unsqueeze(1), context.ranks)[0].squeeze(1)
    capacity = expert_capacity(factor, everyone.shape[0] * k, num_experts)
    kept = serve(everyone, service_order(scores, world.order), capacity.to(choices.device), num_experts)
    return kept[world.own]
