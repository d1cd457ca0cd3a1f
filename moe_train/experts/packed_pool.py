"""An expert pool for a search on the CPU: weights packed once, and each expert's rows by one C kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.experts.parameters import StackedFeedForward
from moe_train.experts.pool import ExpertPool
from moe_train.kernels.decoder.program import PackedExperts, WeightFormat, pack
from moe_train.parallel.permute import count_ids
from moe_train.routing.types import Assignment

MOST_BYTES = 2**30  # of a pool's weights in fp32: packed ones are a second copy


class PackedPool:
    """The experts of a pool with the weights that they had when this was made.

    Args:
        pool: one that :meth:`supports` accepts.
    """

    def __init__(self, pool: ExpertPool, format: WeightFormat) -> None:
        (stack,) = pool.sublayers
        assert isinstance(stack, StackedFeedForward)
        first, second = (
            [pack(expert.t(), format) for expert in weight.detach()] for weight in (stack.fc1_weight, stack.fc2_weight)
        )
        first_bias, second_bias = (None if b is None else b.detach() for b in (stack.fc1_bias, stack.fc2_bias))
        self._experts = PackedExperts(first, first_bias, second, second_bias)
        self._num_experts = pool.num_experts

    @staticmethod
    def supports(pool: ExpertPool) -> bool:
        """Whether all experts are here, with one feed-forward each of ReLU and without a norm, and not too large."""
        spec = pool.spec
        local = not pool.levels and spec.sublayers == 1 and not spec.norm and spec.activation == "relu"
        return local and sum(4 * parameter.numel() for parameter in pool.parameters()) <= MOST_BYTES

    def __call__(self, x: Tensor, assignment: Assignment) -> Tensor:
        """As :meth:`ExpertPool.forward`."""
        load = assignment.load if assignment.load is not None else count_ids(assignment.expert, self._num_experts)
        order = assignment.expert.argsort(stable=True)
        token = assignment.token.index_select(0, order)
        rows = self._experts.run(x.index_select(0, token), load.tolist())
        weight = assignment.weight.index_select(0, order).unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, token, rows.mul_(weight))
