"""Reductions over the ranks that share a micro-batch, for routers that need statistics of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


class DistReduction:
    """Implements :class:`moe_train.routing.context.RankReduction` with torch.distributed. Results carry no gradient.

    Args:
        group: the process group; None is the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, a new tensor."""
        return self.start_sum(value)()

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """Starts the sum over ranks; the returned function waits for it (under NCCL the stream does, not the host)."""
        result = value.detach().clone().contiguous()
        work = dist.all_reduce(result, dist.ReduceOp.SUM, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return result

        return wait

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, a new tensor."""
        result = value.detach().clone().contiguous()
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.group)
        return result
