"""Computes the local experts on rows in expert order, and chooses the back end for it.

One expert is one feed-forward, act(x W1 + b1) W2 + b2, or several residual ones, each with its norm (X-MoE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.amx import amx_feed_forward, amx_weighted_sums
from moe_train.experts.batched import BatchedFeedForward
from moe_train.experts.grouped import grouped_feed_forward
from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import LoopedFeedForward
from moe_train.experts.parameters import StackedFeedForward
from moe_train.experts.row_plan import RowPlan
from moe_train.experts.spec import Activation
from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.matmul import max_padding_for_batched, row_alignment
from moe_train.parallel.permute import permute_rows, unpermute_rows


def prefers_grouped(like: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` is fastest: 16-bit types on a GPU (on a CPU it is a loop)."""
    return like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16) and hasattr(F, "grouped_mm")


def supports_grouped(like: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` accepts this type."""
    return like.dtype in (torch.float32, torch.bfloat16, torch.float16) and hasattr(F, "grouped_mm")


@dataclass(frozen=True)
class Backend:
    """How the experts' products are computed, and the row layout that this needs.

    Attributes:
        name: ``grouped``: one grouped product for all experts, which needs no count on the host; ``amx``: the C kernel
            for bf16 on CPUs with matrix units; ``torch``: one product per expert, or one batched product if all experts
            have the same number of rows.
        align: each expert's rows are padded to a multiple of this.
        max_padding: pad all experts to the largest row count if the padded rows are at most this times the pairs.
    """

    name: Literal["grouped", "amx", "torch"]
    align: int = 1
    max_padding: float = 0.0


def choose_backend(rows: Tensor, activation: Activation, mean_rows: float, padded: bool = False) -> Backend:
    """The fastest back end for these rows.

    Args:
        mean_rows: mean number of pairs per expert.
        padded: some pairs are padding, which only a grouped product can skip without a host sync.
    """
    if prefers_grouped(rows) or (padded and supports_grouped(rows)):
        return Backend("grouped")
    if rows.dtype == torch.bfloat16 and activation == "relu" and amx_mlp.is_supported(rows):
        return Backend("amx")
    return Backend("torch", row_alignment(rows, mean_rows), max_padding_for_batched(rows, mean_rows))


def weighted_sums(
    x: Tensor,
    weight: Tensor,
    plan: RowPlan,
    stacks: Sequence[StackedFeedForward],
    training: bool,
    backend: Backend,
    dtype: torch.dtype | None,
) -> Tensor:
    """[T, d]: Σ over the pairs of each token of weight · f_e(x), in ``dtype`` (None: at least fp32). weight [P]."""
    if backend.name == "amx" and dtype == x.dtype and len(stacks) == 1 and x.shape[0]:
        w1, b1, w2, b2, hidden = of_stack(stacks[0], x.dtype, training)
        return amx_weighted_sums(x, weight, w1, b1, w2, b2, plan, hidden)
    out = run_experts(permute_rows(x, plan.index), plan, stacks, training, backend)
    return unpermute_rows(out, weight, plan.index, dtype)


def run_experts(
    rows: Tensor, plan: RowPlan, stacks: Sequence[StackedFeedForward], training: bool, backend: Backend
) -> Tensor:
    """f_e of each row: rows [N, d] in expert order → [N, d]."""
    if len(stacks) == 1:
        return feed_forward(rows, plan, stacks[0], training, backend)
    y = rows
    for stack in stacks:
        y = y + feed_forward(expert_norm(y, plan, stack), plan, stack, training, backend)
    return y - rows


def feed_forward(rows: Tensor, plan: RowPlan, stack: StackedFeedForward, training: bool, backend: Backend) -> Tensor:
    """One sub-layer: rows [N, d] in expert order → [N, d]."""
    w1, b1, w2, b2, hidden = of_stack(stack, rows.dtype, training)
    if backend.name == "grouped":
        return grouped_feed_forward(rows, w1, b1, w2, b2, plan, hidden)
    if backend.name == "amx":
        return amx_feed_forward(rows, w1, b1, w2, b2, plan, hidden)
    if plan.even:
        return BatchedFeedForward.apply(rows, w1, b1, w2, b2, hidden)  # type: ignore[no-any-return, no-untyped-call]
    return LoopedFeedForward.apply(rows, w1, b1, w2, b2, plan, hidden)  # type: ignore[no-any-return, no-untyped-call]


def of_stack(
    stack: StackedFeedForward, dtype: torch.dtype, training: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, HiddenLayer]:
    """w1, b1, w2 and b2 in ``dtype``, and what is between the products."""
    w1, w2 = stack.fc1_weight.to(dtype), stack.fc2_weight.to(dtype)
    b1, b2 = (None if b is None else b.to(dtype) for b in (stack.fc1_bias, stack.fc2_bias))
    return w1, b1, w2, b2, HiddenLayer(stack.spec.activation, stack.spec.dropout if training else 0.0)


def expert_norm(rows: Tensor, plan: RowPlan, stack: StackedFeedForward) -> Tensor:
    """LayerNorm of rows [N, d] with the weight and bias of each row's expert."""
    assert stack.norm_weight is not None and stack.norm_bias is not None
    weight, bias = (plan.gather_per_row(p.to(rows.dtype)) for p in (stack.norm_weight, stack.norm_bias))
    return torch.addcmul(bias, F.layer_norm(rows, rows.shape[-1:]), weight)
