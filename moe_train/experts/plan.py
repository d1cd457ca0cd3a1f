"""Pairs (token, expert, weight) laid out in expert order: which row of the experts' buffers belongs to which pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """P pairs of T tokens on N rows: each expert's rows stand together, padded to a multiple of ``align``.

    A padding row repeats token 0 and belongs to no pair, so what is computed there reaches nobody. Within an expert,
    rows keep the pairs' order, so that the outcome never varies from run to run.

    Attributes:
        row_token: [N] int64, token of each row.
        row_pair: [N] int64, pair of each row; P for padding.
        pair_row: [P] int64, row of each pair.
        by_token: [P] int64, rows in token order.
        token_start: [T] int64, where each token's rows start in ``by_token``.
        rows: rows of each local expert, padding included, on the host.
    """

    row_token: Tensor
    row_pair: Tensor
    pair_row: Tensor
    by_token: Tensor
    token_start: Tensor
    rows: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each local expert."""
        total, starts = 0, []
        for count in self.rows:
            starts.append(total)
            total += count
        return tuple(starts)


@torch.no_grad()
def plan_rows(token: Tensor, expert: Tensor, num_tokens: int, num_experts: int, align: int = 1) -> RowPlan:
    """Sorts pairs by expert. One host sync, for the counts.

    Args:
        token: [P] in 0 .. num_tokens - 1.
        expert: [P] local ids in 0 .. num_experts - 1.
        num_tokens: T.
        num_experts: local experts.
        align: an expert's rows are padded to a multiple of this.
    """
    pairs = token.shape[0]
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    padded = (counts + (align - 1)) // align * align
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    sorted_row = torch.arange(pairs, device=token.device) + shift[expert[order]]
    rows = tuple(padded.tolist())
    row_pair = torch.full((sum(rows),), pairs, device=token.device)
    row_pair[sorted_row] = order
    row_token = torch.zeros_like(row_pair)
    row_token[sorted_row] = token[order]
    pair_row = torch.empty_like(order)
    pair_row[order] = sorted_row
    by_token = pair_row if _is_sorted(token) else pair_row[torch.argsort(token, stable=True)]
    per_token = torch.bincount(token, minlength=num_tokens)
    return RowPlan(row_token, row_pair, pair_row, by_token, per_token.cumsum(0) - per_token, rows)


def _is_sorted(token: Tensor) -> bool:
    """Whether a token-choice router made the pairs. Only asked where the answer costs no device sync."""
    return token.device.type == "cpu" and bool((token[1:] >= token[:-1]).all())
