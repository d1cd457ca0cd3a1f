"""Row plan: assigns each pair (token, expert, weight) a row in the experts' buffers, in expert order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_train.kernels.device_kernels import TORCH, DeviceKernels
from moe_train.parallel.permute import RowIndex, count_ids


@dataclass(frozen=True)
class RowPlan:
    """P pairs of T tokens on N rows: each expert's rows are contiguous, padded to a multiple.

    A padding row repeats any token and belongs to no pair, so its output is not used. Within an expert, rows keep the
    order of the pairs, so results are reproducible.

    Attributes:
        index: token and pair of each row.
        ends: [E] int32, one past the last row of each local expert; rows after ``ends[-1]`` are padding too.
        rows: number of rows of each local expert with padding, on the host; empty if the back end does not need them.
        sorted_expert: [N] int64, expert of each row, if no expert has padding; E for rows after ``ends[-1]``.
        reaches_end: no row is known to be after ``ends[-1]``.
    """

    index: RowIndex
    ends: Tensor
    rows: tuple[int, ...]
    sorted_expert: Tensor | None
    reaches_end: bool

    @property
    def even(self) -> bool:
        """Whether all local experts have the same number of rows, not 0."""
        return len(set(self.rows)) == 1 and self.rows[0] > 0

    @cached_property
    def row_expert(self) -> Tensor:
        """[N] int64: expert of each row; E for rows after ``ends[-1]``."""
        if self.sorted_expert is not None:
            return self.sorted_expert
        row = torch.arange(self.index.row_pair.shape[0], device=self.ends.device)
        return torch.searchsorted(self.ends, row, right=True)

    def gather_per_row(self, parameter: Tensor) -> Tensor:
        """parameter [E, …] → [N, …]: the value of each row's expert.

        Rows after the last expert get 0: a grouped product leaves them undefined (perhaps NaN), which must not reach
        the last expert's gradient.
        """
        if not self.reaches_end:
            parameter = torch.cat([parameter, parameter.new_zeros(1, *parameter.shape[1:])])
        return parameter.index_select(0, self.row_expert)


@torch.no_grad()
def plan_rows(
    token: Tensor,
    expert: Tensor,
    num_tokens: int,
    num_experts: int,
    align: int = 1,
    counts: Sequence[int] | None = None,
    max_padding: float = 0.0,
    *,
    load: Tensor | None = None,
    per_token: int = 0,
    kernels: DeviceKernels = TORCH,
) -> RowPlan:
    """Sorts pairs by expert.

    Args:
        token: [P] in 0 .. num_tokens - 1.
        expert: [P] local ids in 0 .. num_experts - 1; without ``counts`` and ``load`` also num_experts, for pairs
            without an expert, whose rows come last.
        num_tokens: T.
        num_experts: number of local experts.
        align: each expert's rows are padded to a multiple of this.
        counts: number of pairs of each expert, if known on the host; otherwise N is its upper bound.
        max_padding: all experts are padded to the largest row count if the padded rows are at most this times the pairs
            (with ``counts`` only).
        load: [E], number of pairs of each expert, if known on the device.
        per_token: k if pair p is known to belong to token p // k, for all p; 0: not known.
        kernels: the Triton kernels in use, for the rows too.
    """
    if counts is None and align == 1 and kernels.uses("order", expert):
        found = kernels.sort_by_expert(expert, num_experts + 1)
        index = RowIndex.of_pairs(found.order, found.position, token, num_tokens, per_token, kernels)
        return RowPlan(index, found.ends[:num_experts], (), found.sorted_expert, load is not None)
    pairs = token.shape[0]
    sorted_expert, order = expert.sort(stable=True)
    sorted_row = torch.arange(pairs, device=token.device)
    reaches_end = counts is not None or (load is not None and align == 1)
    load = count_ids(expert, num_experts + 1) if load is None else load
    rows = tuple(-(-count // align) * align for count in counts) if counts is not None else ()
    even = bool(max_padding and rows) and max(rows) * num_experts <= max_padding * pairs
    rows = (max(rows),) * num_experts if even else rows
    exact = align == 1 if counts is None else rows == tuple(counts)
    if exact:
        padded, row_pair = load, order
    else:
        padded = (load + (align - 1)) // align * align
        padded = padded.amax().expand_as(padded) if even else padded
        padding = padded - load
        sorted_row = sorted_row + (padding.cumsum(0) - padding)[sorted_expert]
        total = sum(rows) if counts is not None else pairs + num_experts * (align - 1)
        row_pair = torch.full((total,), pairs, device=token.device).scatter_(0, sorted_row, order)
    pair_row = torch.empty_like(order).scatter_(0, order, sorted_row)
    ends = padded[:num_experts].cumsum(0, dtype=torch.int32)
    index = RowIndex.of_pairs(row_pair, pair_row, token, num_tokens, per_token, kernels)
    return RowPlan(index, ends, rows, sorted_expert if exact else None, reaches_end)
