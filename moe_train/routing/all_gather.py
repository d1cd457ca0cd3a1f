"""What routers need of the other ranks beyond a sum: every rank's rows, in an order that one process would have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.context import RankReduction, RoutingContext


def all_gather_rows(rows: Tensor, ranks: RankReduction) -> tuple[Tensor, Tensor]:
    """The rows of all ranks on every rank, ordered by rank.

    A sum over zero-filled tables: adding zeros changes no bit. Not differentiated.

    Args:
        rows: [T, w] of this rank; T may differ between ranks and be 0.

    Returns:
        (all rows [N, w], the indices [T] of this rank's own rows among them).
    """
    rows = rows.detach()
    counts = torch.zeros(ranks.size, dtype=torch.int64, device=rows.device)
    counts[ranks.rank] = rows.shape[0]
    counts = ranks.sum(counts)
    table = rows.new_zeros(ranks.size, int(counts.max()), rows.shape[1])
    table[ranks.rank, : rows.shape[0]] = rows
    table = ranks.sum(table)
    present = torch.arange(table.shape[1], device=rows.device) < counts.unsqueeze(1)
    first = counts[: ranks.rank].sum()
    return table[present], first + torch.arange(rows.shape[0], device=rows.device)


@dataclass(frozen=True)
class WorldOrder:
    """The tokens of all ranks, and where they would stand on one process.

    Attributes:
        order: [N] int64, indices of gathered rows in the one-process order (passes, sentences, positions).
        own: [T] int64, this rank's rows among the gathered ones.
    """

    order: Tensor
    own: Tensor


def world_order(context: RoutingContext) -> WorldOrder:
    """The order of the world's tokens: rank r of n holds the sentences r, r + n, r + 2n … of each pass."""
    ranks, passes = context.ranks, context.pass_index
    first = torch.full((2,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=passes.device)
    first = first.scatter_reduce(0, passes, context.sentence, "amin")
    sentence = (context.sentence - first[passes]) * ranks.size + ranks.rank
    keys, own = all_gather_rows(torch.stack((passes, sentence, context.position), dim=1), ranks)
    order = torch.arange(keys.shape[0], device=keys.device)
    for column in (2, 1, 0):  # least significant key first; each sort is stable
        order = order[torch.argsort(keys[order, column], stable=True)]
    return WorldOrder(order, own)


def world_tokens(rows: Tensor, ranks: RankReduction) -> Tensor:
    """0-dim int64: rows over all ranks."""
    return ranks.sum(torch.full((), rows.shape[0], device=rows.device))
