"""The experts held on this rank, on rows in expert order: the back end of their products is chosen here, and only here.

One expert is one feed-forward, act(x W1 + b1) W2 + b2, or several residual ones with norms of their own (X-MoE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts.amx import amx_feed_forward
from moe_train.experts.batched import BatchedFeedForward
from moe_train.experts.grouped import grouped_feed_forward
from moe_train.experts.hidden_layer import HiddenLayer
from moe_train.experts.loop import LoopedFeedForward
from moe_train.experts.parameters import StackedFeedForward
from moe_train.experts.row_plan import RowPlan
from moe_train.experts.spec import Activation
from moe_train.kernels.cpu import amx_mlp
from moe_train.kernels.cpu.matmul import padding_worth_a_batch, row_alignment


def prefers_grouped(like: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` is fastest: 16-bit types on a GPU. (On a CPU it loops.)"""
    return like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16) and hasattr(F, "grouped_mm")


def can_group(like: Tensor) -> bool:
    """Whether it can be used at all."""
    return like.dtype in (torch.float32, torch.bfloat16, torch.float16) and hasattr(F, "grouped_mm")


@dataclass(frozen=True)
class Backend:
    """How the products of the experts are computed, and how rows must lie for them.

    Attributes:
        name: ``grouped``: one grouped product for all experts, which needs no count on the host; ``amx``: our kernel
            for bf16 on CPUs with matrix units; ``torch``: a product for each expert, or one batched product where each
            expert has equally many rows.
        align: the rows of an expert are padded to a multiple of this.
        max_padding: all experts are padded to the fullest one's rows where that makes at most this times the pairs.
    """

    name: Literal["grouped", "amx", "torch"]
    align: int = 1
    max_padding: float = 0.0


def choose_backend(rows: Tensor, activation: Activation, mean_rows: float, padded: bool = False) -> Backend:
    """The fastest back end for rows like these.

    Args:
        mean_rows: pairs of one expert.
        padded: some pairs are padding: only a grouped product can pass over them without a read by the host.
    """
    if prefers_grouped(rows) or (padded and can_group(rows)):
        return Backend("grouped", row_alignment(rows, mean_rows))
    if rows.dtype == torch.bfloat16 and activation == "relu" and amx_mlp.is_supported(rows):
        return Backend("amx")
    return Backend("torch", row_alignment(rows, mean_rows), padding_worth_a_batch(rows, mean_rows))


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
    w1, w2 = stack.fc1_weight.to(rows.dtype), stack.fc2_weight.to(rows.dtype)
    b1, b2 = (None if b is None else b.to(rows.dtype) for b in (stack.fc1_bias, stack.fc2_bias))
    hidden = HiddenLayer(stack.spec.activation, stack.spec.dropout if training else 0.0)
    if backend.name == "grouped":
        return grouped_feed_forward(rows, w1, b1, w2, b2, plan, hidden)
    if backend.name == "amx":
        return amx_feed_forward(rows, w1, b1, w2, b2, plan, hidden)
    if plan.even:
        return BatchedFeedForward.apply(rows, w1, b1, w2, b2, hidden)  # type: ignore[no-any-return, no-untyped-call]
    return LoopedFeedForward.apply(rows, w1, b1, w2, b2, plan, hidden)  # type: ignore[no-any-return, no-untyped-call]


def expert_norm(rows: Tensor, plan: RowPlan, stack: StackedFeedForward) -> Tensor:
    """LayerNorm with the weight and bias of each row's expert."""
    assert stack.norm_weight is not None and stack.norm_bias is not None
    weight, bias = (plan.of_rows(p.to(rows.dtype)) for p in (stack.norm_weight, stack.norm_bias))
    return torch.addcmul(bias, F.layer_norm(rows, rows.shape[-1:]), weight)
