"""Capacity: how many tokens an expert takes, who comes first, and what is dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_train.routing.all_gather import all_gather_rows, world_order
from moe_train.routing.context import RoutingContext

Group = Literal["rank", "global"]
Rounding = Literal["result", "share"]


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


def group_tokens(choices: Tensor, context: RoutingContext, group: Group) -> Tensor:
    """0-dim fp64: the tokens that share a capacity."""
    tokens = torch.full((), choices.shape[0], dtype=torch.float64, device=choices.device)
    return context.ranks.sum(tokens) if shared_by_ranks(context, group) else tokens


def shared_by_ranks(context: RoutingContext, group: Group) -> bool:
    """Whether the ranks queue together. At evaluation a batch belongs to one rank."""
    return group == "global" and context.training


def expert_capacity(factor: float, pairs: Tensor, num_experts: int) -> Tensor:
    """0-dim: ``ceil(factor · pairs / E)``, where ``pairs`` is k·T; at least 1."""
    return torch.ceil(factor * pairs / num_experts).clamp(min=1)


def capacity_of_shares(factor: float, tokens: Tensor, k: int, num_experts: int) -> Tensor:
    """0-dim: ``floor(factor · k · ceil(T / E))``, at least 1: how fairseq's Switch and GShard gates round."""
    return torch.floor(factor * (k * torch.ceil(tokens / num_experts))).clamp(min=1)


def service_order(priority: Tensor | None, order: Tensor) -> Tensor:
    """``order`` [T], resorted so that a higher ``priority`` [T] comes first (batch-prioritised routing, V-MoE §3.4)."""
    if priority is None:
        return order
    return order[torch.argsort(priority[order], descending=True, stable=True)]


def drop(
    choices: Tensor,
    capacity: Tensor,
    num_experts: int,
    context: RoutingContext,
    *,
    group: Group = "rank",
    priority: Tensor | None = None,
) -> Tensor:
    """The choices that fit, [T, k] bool.

    Args:
        choices: [T, k] expert ids, -1 for no choice.
        capacity: 0-dim, pairs that an expert takes.
        group: ``rank`` (each rank's tokens queue on their own) or ``global`` (the whole micro-batch does, with the same
            outcome on any number of ranks).
        priority: [T], higher is served first; None: in the order of the batch.
    """
    if not shared_by_ranks(context, group):
        order = torch.arange(choices.shape[0], device=choices.device)
        return serve(choices, service_order(priority, order), capacity, num_experts)
    world = world_order(context)
    everyone, _ = all_gather_rows(choices, context.ranks)
    scores = None if priority is None else all_gather_rows(priority.unsqueeze(1), context.ranks)[0].squeeze(1)
    kept = serve(everyone, service_order(scores, world.order), capacity, num_experts)
    return kept[world.own]
