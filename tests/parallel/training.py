"""Training steps that run on the ranks in this folder's tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_train.experts import ExpertPool, ExpertSpec
from moe_train.parallel.gradients import (
    dense_parameters,
    expert_parameters,
    gradient_norm,
    ignore_experts_in_ddp,
    is_expert,
    reduce_dense_gradients,
    reduce_expert_gradients,
)
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.parallel.reducers import DistReduction
from moe_train.routing import Assignment

TOKENS = 24


class Net(nn.Module):
    """A dense layer, a gate, experts, a dense layer."""

    def __init__(self, layout: ExpertLayout | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gate, self.outer = nn.Linear(6, 6), nn.Linear(6, 8, bias=False), nn.Linear(6, 3)
        self.pool = ExpertPool(ExpertSpec(dim=6, hidden=10), 8, layout)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        token = torch.arange(x.shape[0]).repeat_interleave(2)
        pairs = Assignment(token, chosen.reshape(-1), weight.reshape(-1))
        return self.outer(x + self.pool(x, pairs))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64),
            torch.randn(TOKENS, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def same_on_replicas(parameters: Mapping[str, nn.Parameter], layout: ExpertLayout) -> list[str]:
    """Names of parameters that differ between ranks that should hold the same values."""
    wrong = []
    for name, parameter in parameters.items():
        group = layout.replica_group if is_expert(parameter) else (dist.group.WORLD if layout.mesh else None)
        if group is None:
            continue
        low, high = parameter.detach().clone(), parameter.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        if not torch.equal(low, high):
            wrong.append(name)
    return wrong


def train(expert_parallel: int | None, with_ddp: bool, steps: int = 10) -> tuple[dict[str, Tensor], list[float]]:
    """Ten clipped SGD steps; gives dense parameters by name and experts' as ``name/expert``, and the norms."""
    world, rank, layout = 1, 0, None
    if expert_parallel is not None:
        world, rank = dist.get_world_size(), dist.get_rank()
        layout = ExpertLayout.build(plan_layout(world, world, expert_parallel, 8))
    net = Net(layout).double()
    shares = net.pool.layout
    model: nn.Module = net
    if with_ddp:
        ignore_experts_in_ddp(net)
        model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    norms = []
    for x, wanted in batches(steps):
        optimizer.zero_grad()
        # Rank 0 has nothing in a world of several.
        mine = torch.arange(TOKENS)[(torch.arange(TOKENS) % max(world - 1, 1)) == (rank - 1 if world > 1 else 0)]
        loss = (model(x[mine]) - wanted[mine]).square().sum() / TOKENS
        if with_ddp:
            (loss * world).backward()
            reduce_expert_gradients(net.parameters(), shares, divide_by=world)
        else:
            loss.backward()
            reduce_dense_gradients(net.parameters())
            reduce_expert_gradients(net.parameters(), shares)
        norm = gradient_norm(net.parameters(), shares)
        nn.utils.clip_grads_with_norm_(net.parameters(), 0.5, norm)
        norms.append(float(norm))
        optimizer.step()
    assert same_on_replicas(dict(net.named_parameters()), shares) == []
    state = {name: p.detach() for name, p in dense_parameters(net).items()}
    for name, p in expert_parameters(net).items():
        state |= {f"{name}/{e}": value for e, value in zip(net.pool.expert_ids, p.detach(), strict=True)}
    return state, norms


def statistics() -> tuple[int, int, list[int], float, bool]:
    ranks = DistReduction()
    value = torch.tensor([ranks.rank, 1])
    total = ranks.sum(value)
    assert value[0] == ranks.rank, "the argument must stay as it was"
    share = torch.tensor(float(ranks.rank), requires_grad=True)
    return ranks.size, ranks.rank, total.tolist(), float(ranks.max(share)), ranks.sum(share).requires_grad


def initial(expert_parallel: int) -> dict[int, Tensor]:
    torch.manual_seed(5)
    layout = ExpertLayout.build(plan_layout(4, 4, expert_parallel, 8))
    pool = ExpertPool(ExpertSpec(dim=6, hidden=10), 8, layout)
    return dict(zip(pool.expert_ids, pool.sublayers[0].fc1_weight.detach(), strict=True))
