"""Pairs (token, expert, weight) laid out in expert order: which row of the experts' buffers belongs to which pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.permute import RowIndex, count_ids


@dataclass(frozen=True)
class RowPlan:
    """P pairs of T tokens on N rows: each expert's rows stand together, padded to a multiple.

    A padding row repeats token 0 and belongs to no pair, so what is computed there reaches nobody. Within an expert,
    rows keep the pairs' order, so that the outcome never varies from run to run.

    Attributes:
        index: which token each row is.
        ends: [E] int32, one past the last row of each local expert; rows behind the last of them are padding too.
        rows: rows of each local expert, padding included, on the host; empty where nobody there needs them.
    """

    index: RowIndex
    ends: Tensor
    rows: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether each local expert has equally many rows, and some."""
        return len(set(self.rows)) == 1 and self.rows[0] > 0

    def of_rows(self, parameter: Tensor) -> Tensor:
        """[N, …] of a parameter [E, …]: for each row its expert's.

        Rows behind the last expert get a zero of their own: what a grouped product leaves there, NaN perhaps, must not
        reach the last expert's gradient.
        """
        row = torch.arange(self.index.row_token.shape[0], device=self.ends.device)
        expert = torch.searchsorted(self.ends, row, right=True)
        return torch.cat([parameter, parameter.new_zeros(1, *parameter.shape[1:])]).index_select(0, expert)


@torch.no_grad()
def plan_rows(
    token: Tensor,
    expert: Tensor,
    num_tokens: int,
    num_experts: int,
    align: int = 1,
    counts: Sequence[int] | None = None,
    max_padding: float = 0.0,
) -> RowPlan:
    """Sorts pairs by expert.

    Args:
        token: [P] in 0 .. num_tokens - 1.
        expert: [P] local ids in 0 .. num_experts - 1; without ``counts`` also num_experts, for pairs that belong to
            none: their rows stand behind all others.
        num_tokens: T.
        num_experts: local experts.
        align: an expert's rows are padded to a multiple of this.
        counts: pairs of each expert, where the host knows them; otherwise N is the largest that can be.
        max_padding: where all experts can have the fullest one's rows with at most this times the pairs, they do (with
            ``counts`` only).
    """
    pairs = token.shape[0]
    order = torch.argsort(expert, stable=True)
    found = count_ids(expert, num_experts + 1)
    padded = (found + (align - 1)) // align * align
    rows = tuple(-(-count // align) * align for count in counts) if counts is not None else ()
    if max_padding and rows and max(rows) * num_experts <= max_padding * pairs:
        rows, padded = (max(rows),) * num_experts, padded.amax().expand_as(padded)
    ends = padded[:-1].cumsum(0).to(torch.int32)
    if counts is not None and rows == tuple(counts):
        return RowPlan(RowIndex.of_order(order, token, num_tokens), ends, rows)
    total = sum(rows) if counts is not None else pairs + num_experts * (align - 1)
    shift = (padded.cumsum(0) - padded) - (found.cumsum(0) - found)
    sorted_row = torch.arange(pairs, device=token.device) + shift[expert[order]]
    row_pair = torch.full((total,), pairs, device=token.device)
    row_pair[sorted_row] = order
    row_token = torch.zeros_like(row_pair)
    row_token[sorted_row] = token[order]
    pair_row = torch.empty_like(order)
    pair_row[order] = sorted_row
    return RowPlan(RowIndex.of_pairs(row_token, row_pair, pair_row, token, num_tokens), ends, rows)
