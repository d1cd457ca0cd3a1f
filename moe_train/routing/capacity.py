"""Expert capacity: how many pairs an expert takes, in which order, and which choices are dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_train.routing.all_gather import all_gather_rows, world_order
from moe_train.routing.context import RoutingContext

Group = Literal["rank", "global"]
Rounding = Literal["result", "share"]


def positions_in_expert(queue: Tensor, num_experts: int) -> Tensor:
    """Position of each entry among the entries of the same expert.

    Args:
        queue: [Q] int64 expert ids in order of priority; negative: no expert (the position is meaningless).

    Returns:
        [Q] int64, 0 for the first entry of an expert.
    """
    ids = torch.where(queue < 0, num_experts, queue)
    ordered, permutation = torch.sort(ids, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=queue.device))
    places = torch.empty_like(queue)
    places[permutation] = torch.arange(queue.numel(), device=queue.device) - starts[ordered]
    return places


def within_capacity(choices: Tensor, order: Tensor, capacity: Tensor | float, num_experts: int) -> Tensor:
    """Which choices are within capacity; all first choices have priority over all second choices (GShard, §2.2).

    Args:
        choices: [T, k] expert ids, -1 for no choice.
        order: [T] int64, tokens in order of priority.
        capacity: maximum number of pairs per expert.

    Returns:
        [T, k] bool.
    """
    tokens, k = choices.shape
    queue = choices[order].t().reshape(-1)
    served = (positions_in_expert(queue, num_experts) < capacity) & (queue >= 0)
    kept = torch.empty_like(choices, dtype=torch.bool)
    kept[order] = served.view(k, tokens).t()
    return kept


def group_tokens(choices: Tensor, context: RoutingContext, group: Group) -> Tensor:
    """0-dim fp64: number of tokens that share a capacity."""
    tokens = torch.full((), choices.shape[0], dtype=torch.float64, device=choices.device)
    return context.ranks.sum(tokens) if shared_by_ranks(context, group) else tokens


def shared_by_ranks(context: RoutingContext, group: Group) -> bool:
    """Whether the ranks share a capacity. At evaluation they do not: each batch belongs to one rank."""
    return group == "global" and context.training


def expert_capacity(factor: float, pairs: Tensor, num_experts: int) -> Tensor:
    """0-dim: ``ceil(factor · pairs / E)`` with ``pairs`` = k·T, at least 1."""
    return torch.ceil(factor * pairs / num_experts).clamp(min=1)


def capacity_of_shares(factor: float, tokens: Tensor, k: int, num_experts: int) -> Tensor:
    """0-dim: ``floor(factor · k · ceil(T / E))``, at least 1, as in fairseq's Switch and GShard gates."""
    return torch.floor(factor * (k * torch.ceil(tokens / num_experts))).clamp(min=1)


def priority_order(priority: Tensor | None, order: Tensor) -> Tensor:
    """``order`` [T] sorted by descending ``priority`` [T] (batch-prioritised routing, V-MoE §3.4)."""
    if priority is None:
        return order
    return order[torch.argsort(priority[order], descending=True, stable=True)]


def capacity_mask(
    choices: Tensor,
    capacity: Tensor,
    num_experts: int,
    context: RoutingContext,
    *,
    group: Group = "rank",
    priority: Tensor | None = None,
) -> Tensor:
    """[T, k] bool: the choices that are within capacity.

    Args:
        choices: [T, k] expert ids, -1 for no choice.
        capacity: 0-dim, maximum number of pairs per expert.
        group: ``rank`` (capacity per rank) or ``global`` (capacity of the whole micro-batch, with the same result on
            any number of ranks).
        priority: [T], higher first; None: the order of the batch.
    """
    if not shared_by_ranks(context, group):
        order = torch.arange(choices.shape[0], device=choices.device)
        return within_capacity(choices, priority_order(priority, order), capacity, num_experts)
    world = world_order(context)
    all_choices, _ = all_gather_rows(choices, context.ranks)
    scores = None if priority is None else all_gather_rows(priority.unsqueeze(1), context.ranks)[0].squeeze(1)
    kept = within_capacity(all_choices, priority_order(scores, world.order), capacity, num_experts)
    return kept[world.own]
