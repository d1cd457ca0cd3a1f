"""Gathers rows from all ranks, and gives the order that they would have on one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.routing.context import RankReduction, RoutingContext


def all_gather_rows(rows: Tensor, ranks: RankReduction) -> tuple[Tensor, Tensor]:
    """The rows of all ranks on every rank, ordered by rank.

    Implemented as a sum over zero-filled tables, which is bit-exact. Not differentiated.

    Args:
        rows: [T, w] of this rank; T may differ between ranks, and may be 0.

    Returns:
        All rows [N, w], and the indices [T] of this rank's rows among them.
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
    """The tokens of all ranks in the order of one process.

    Attributes:
        order: [N] int64, indices of the gathered rows, sorted by pass, sentence and position.
        own: [T] int64, indices of this rank's rows among the gathered rows.
    """

    order: Tensor
    own: Tensor


def world_order(context: RoutingContext) -> WorldOrder:
    """Order of the tokens of all ranks. Rank r of n holds the sentences r, r + n, r + 2n … of each pass."""
    ranks, passes = context.ranks, context.pass_index
    first = torch.full((2,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=passes.device)
    first = first.scatter_reduce(0, passes, context.sentence, "amin")
    sentence = (context.sentence - first[passes]) * ranks.size + ranks.rank
    keys, own = all_gather_rows(torch.stack((passes, sentence, context.position), dim=1), ranks)
    order = torch.arange(keys.shape[0], device=keys.device)
    for column in (2, 1, 0):  # least significant key first; each sort is stable
        order = order[torch.argsort(keys[order, column], stable=True)]
    return WorldOrder(order, own)
