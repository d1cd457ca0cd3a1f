"""Backward passes on the ranks of the tests of the reduction over replicas."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.parallel.gradients import reduce_expert_gradients
from moe_train.parallel.layout import ExpertLayout
from moe_train.parallel.layout_plan import plan_layout
from moe_train.parallel.replica_gradients import ReplicaGradients

SHAPES = ((5, 4, 3), (5, 3), (5, 3, 4), (5, 4), (2, 7))
MICRO_BATCHES = 3


def sums(half: bool, updates: int = 2) -> tuple[list[Tensor], list[Tensor], list[list[int]], int]:
    """Gradients of some updates, reduced during backward and by :func:`reduce_expert_gradients` after it.

    Every rank uses the parameters in another order, rank 0 not all of them.

    Returns:
        Both; the sizes of the all-reduces of each update, in their order; how many of them began before ``finish``.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = ExpertLayout.build(plan_layout(world, world, 1, 5))
    parameters, plain = ([nn.Parameter(torch.ones(shape)) for shape in SHAPES] for _ in range(2))
    for parameter in plain:
        parameter.expert = True  # type: ignore[attr-defined]
    leaves = [nn.Parameter(p.detach().bfloat16()) if half else p for p in parameters]
    group = layout.replica_group
    assert group is not None
    gradients = ReplicaGradients(dict(zip(leaves, parameters, strict=True)), group, bucket_bytes=400)
    ours: list[Tensor] = []
    want: list[Tensor] = []
    order: list[list[int]] = []
    reduce, begun = dist.all_reduce, 0

    def counted(tensor: Tensor, **keys: object) -> object:
        order[-1].append(tensor.numel())
        return reduce(tensor, **keys)

    for update in range(updates):
        order.append([])
        used = range(rank == 0, len(SHAPES))
        with patch.object(dist, "all_reduce", counted):
            for number in range(MICRO_BATCHES):
                gradients.last = number == MICRO_BATCHES - 1
                generator = torch.Generator().manual_seed(100 * update + 10 * number + rank)
                factors = [torch.randn(shape, generator=generator).to(leaves[0].dtype) for shape in SHAPES]
                for i in sorted(used, reverse=bool(rank % 2)):
                    (leaves[i] * factors[i]).sum().backward()
                    grad = plain[i].grad
                    plain[i].grad = factors[i].float() if grad is None else grad + factors[i].float()
                assert gradients.last or not order[-1], "only the last micro-batch is reduced"
            begun = len(order[-1])
            gradients.finish()
        reduce_expert_gradients(plain, layout)
        assert all(leaf.grad is None for leaf in leaves) == half
        for parameter, other in zip(parameters, plain, strict=True):
            assert parameter.grad is gradients.views[parameter] and other.grad is not None
            ours.append(parameter.grad.clone())
            want.append(other.grad)
            parameter.grad = other.grad = None
        assert bool(gradients.norms.all_finite(torch.device("cpu")))
    return ours, want, order, begun
