"""Row plan: assigns each pair (token, expert, weight) a row in the experts' buffers, in expert order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.parallel.permute import RowIndex, count_ids


@dataclass(frozen=True)
class RowPlan:
    """P pairs of T tokens on N rows: each expert's rows are contiguous, padded to a multiple.

    A padding row repeats token 0 and belongs to no pair, so its output is not used. Within an expert, rows keep the
    order of the pairs, so results are reproducible.

    Attributes:
        index: token and pair of each row.
        ends: [E] int32, one past the last row of each local expert; rows after ``ends[-1]`` are padding too.
        rows: number of rows of each local expert with padding, on the host; empty if the back end does not need them.
    """

    index: RowIndex
    ends: Tensor
    rows: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether all local experts have the same number of rows, not 0."""
        return len(set(self.rows)) == 1 and self.rows[0] > 0

    def gather_per_row(self, parameter: Tensor) -> Tensor:
        """parameter [E, …] → [N, …]: the value of each row's expert.

        Rows after the last expert get 0: a grouped product leaves them undefined (perhaps NaN), which must not reach
        the last expert's gradient.
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
        expert: [P] local ids in 0 .. num_experts - 1; without ``counts`` also num_experts, for pairs without an
            expert, whose rows come last.
        num_tokens: T.
        num_experts: number of local experts.
        align: each expert's rows are padded to a multiple of this.
        counts: number of pairs of each expert, if known on the host; otherwise N is its upper bound.
        max_padding: all experts are padded to the largest row count if the padded rows are at most this times the pairs
            (with ``counts`` only).
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
