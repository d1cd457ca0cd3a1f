"""What runs on the ranks in this folder's tests: a pool under some layout on this rank's share of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.gradients import gradient_norm, reduce_expert_gradients
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.routing import Assignment


@dataclass(frozen=True)
class Case:
    """A batch of the world and the pool that carries it out; everything drawn by seed.

    Attributes:
        shares: tokens of each rank, in world order.
        routing: how the top_k experts of a token are drawn, see :meth:`choose`.
        options: how tokens are dispatched; ``shared`` adds a product that it overlaps with.
    """

    shares: tuple[int, ...]
    num_experts: int = 8
    top_k: int = 2
    routing: str = "random"
    dtype: torch.dtype = torch.float64
    dim: int = 12
    seed: int = 0
    spec: tuple[tuple[str, Any], ...] = ()
    recompute: bool = False
    options: DispatchOptions = field(default_factory=DispatchOptions)
    shared: bool = False

    def pool(self, layout: ExpertLayout | None = None) -> ExpertPool:
        torch.manual_seed(self.seed)
        spec = ExpertSpec(**{"dim": self.dim, "hidden": 16, **dict(self.spec)})
        return ExpertPool(spec, self.num_experts, layout, self.top_k).to(self.dtype)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, d], choices [T, k], weights [T, k], gradient of y [T, d] of the whole world."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = sum(self.shares)
        x = torch.randn(tokens, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)
        weights = torch.rand(tokens, self.top_k, generator=generator)
        grad = torch.randn(tokens, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)
        return x, self.choose(tokens, generator), weights, grad

    def choose(self, tokens: int, generator: torch.Generator) -> Tensor:
        if self.routing == "one":  # all tokens on one expert
            return torch.full((tokens, self.top_k), self.num_experts - 1)
        if self.routing == "few":  # most experts without a token
            return torch.randint(2, (tokens, self.top_k), generator=generator) + 1
        if self.routing == "grouped":  # as SAM: all k in one of four groups of experts
            each = self.num_experts // 4
            inside = torch.rand(tokens, each, generator=generator).topk(self.top_k).indices
            return torch.randint(4, (tokens, 1), generator=generator) * each + inside
        return torch.rand(tokens, self.num_experts, generator=generator).topk(self.top_k).indices


@dataclass(frozen=True)
class Outcome:
    """What a run gives: y and gradients of x and weights of its tokens, gradients of its experts by global id."""

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    experts: dict[str, dict[int, Tensor]]
    norm: float
    traffic: dict[str, dict[str, int]]
    reads: int
    dropped: int


def carry_out(case: Case, layout: ExpertLayout | None, share: slice) -> Outcome:
    """Forward and backward of a share of the world's batch."""
    pool = case.pool(layout)
    x, choices, weights, grad = (value[share] for value in case.batch())
    x.requires_grad_()
    weights.requires_grad_()
    token = torch.arange(x.shape[0]).repeat_interleave(case.top_k)
    pairs = Assignment(token, choices.reshape(-1), weights.reshape(-1))
    pool.layout.counters.clear()
    before = pool.layout.counters.host_reads
    y = checkpoint(pool, x, pairs, use_reentrant=False) if case.recompute else forward(pool, case, x, pairs)
    y.backward(grad)
    reduce_expert_gradients(pool.parameters(), pool.layout)
    experts = {
        name: dict(zip(pool.expert_ids, parameter.grad, strict=True))
        for name, parameter in pool.named_parameters()
        if parameter.grad is not None
    }
    norm = float(gradient_norm(pool.parameters(), pool.layout))
    assert x.grad is not None and weights.grad is not None
    counters = pool.layout.counters
    reads = counters.host_reads - before
    return Outcome(y.detach(), x.grad, weights.grad, experts, norm, counters.as_dict(), reads, counters.dropped)


def forward(pool: ExpertPool, case: Case, x: Tensor, pairs: Assignment) -> Tensor:
    """Like a layer with a shared expert, if the case has a product outside the experts."""
    if not case.shared:
        return pool(x, pairs)  # type: ignore[no-any-return]
    pending = pool.start(x, pairs)
    shared = x * x.sum(1, keepdim=True)
    return pool.finish(pending) + shared


def on_rank(case: Case, expert_parallel: int, ranks_per_node: int, two_level: bool) -> Outcome:
    """This rank's share, under a layout."""
    plan = plan_layout(dist.get_world_size(), ranks_per_node, expert_parallel, case.num_experts, two_level)
    layout = ExpertLayout.build(plan, options=case.options)
    start = sum(case.shares[: layout.rank])
    return carry_out(case, layout, slice(start, start + case.shares[layout.rank]))


def alone(case: Case) -> Outcome:
    """One process with the whole batch."""
    return carry_out(case, None, slice(0, sum(case.shares)))
