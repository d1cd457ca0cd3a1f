"""The plainest way to carry out an assignment: one pair at a time, nothing batched. For comparison only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.routing import Assignment


def expert(pool: ExpertPool, e: int, x: Tensor) -> Tensor:
    """f_e(x) of one row x [d], without dropout."""
    spec, y = pool.spec, x
    for stack in pool.sublayers:
        inner = F.layer_norm(y, (spec.dim,), stack.norm_weight[e], stack.norm_bias[e]) if spec.norm else y
        h = inner @ stack.fc1_weight[e]
        h = h + stack.fc1_bias[e] if spec.bias else h
        h = F.relu(h) if spec.activation == "relu" else F.gelu(h)
        out = h @ stack.fc2_weight[e]
        out = out + stack.fc2_bias[e] if spec.bias else out
        y = y + out if spec.norm else out
    return y - x if spec.norm else y


def mix(pool: ExpertPool, x: Tensor, assignment: Assignment) -> Tensor:
    """y [T, d] of x [T, d]."""
    rows = [x[t] * 0 for t in range(x.shape[0])]
    pairs = zip(assignment.token.tolist(), assignment.expert.tolist(), assignment.weight, strict=True)
    for t, e, w in pairs:
        rows[t] = rows[t] + w.to(x.dtype) * expert(pool, e, x[t])
    return torch.stack(rows) if rows else x * 1


def random_assignment(
    tokens: int, num_experts: int, pairs: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Assignment:
    """Any pairs at all: tokens with none, with several, experts with none."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(tokens, (pairs,), generator=generator) if tokens else torch.zeros(0, dtype=torch.long)
    chosen = torch.randint(num_experts, token.shape, generator=generator)
    weight = torch.rand(token.shape, generator=generator, dtype=dtype).requires_grad_()
    return Assignment(token, chosen, weight)


def pool_of(seed: int = 0, num_experts: int = 4, dtype: torch.dtype = torch.float64, **spec: object) -> ExpertPool:
    """A small pool with seeded weights."""
    torch.manual_seed(seed)
    return ExpertPool(ExpertSpec(**{"dim": 6, "hidden": 10, **spec}), num_experts).to(dtype)  # type: ignore[arg-type]
