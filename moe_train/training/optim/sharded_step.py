"""ZeRO 1 without DeepSpeed: each parameter is stepped by one of the ranks that share it, which then sends it.

After Rajbhandari et al., 2020 (arXiv:1910.02054), with whole parameters instead of slices: a rank keeps the optimizer's
state of those that it steps. It computes what every rank would have computed, so results are the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.parallel.gradients import in_buckets, is_expert
from moe_train.parallel.layout import ExpertLayout

_MOST_PENDING = 3  # broadcasts


class ShardedStep:
    """Which rank steps which parameter: the largest first, each by the rank that has least.

    Experts that are divided over ranks are shared by their replicas, all other parameters by the world.

    Args:
        bucket_bytes: parameters are sent in buckets of about this size.

    Attributes:
        own: the parameters that this rank steps.
    """

    def __init__(self, module: nn.Module, layout: ExpertLayout, bucket_bytes: int) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        divided = layout.plan.expert_parallel > 1
        shared = [p for p in trained if not (divided and is_expert(p))]
        experts = [p for p in trained if divided and is_expert(p)]
        self.own: set[nn.Parameter] = set()
        self._sent: list[tuple[dist.ProcessGroup, int, list[nn.Parameter]]] = []  # group, sender's rank in the world
        for group, parameters in ((dist.group.WORLD, shared), (layout.replica_group, experts)):
            if group is not None and parameters:
                ranks = dist.get_process_group_ranks(group)
                parts = _parts(parameters, len(ranks))
                self.own.update(parts[dist.get_rank(group)])
                for rank, part in zip(ranks, parts, strict=True):
                    self._sent += [(group, rank, bucket) for bucket in in_buckets(part, bucket_bytes) if len(ranks) > 1]

    @torch.no_grad()
    def exchange(self) -> None:
        """Sends what this rank has stepped, and takes what others have; a few buckets at a time."""
        pending: deque[tuple[dist.Work, Tensor, list[nn.Parameter]]] = deque()
        for group, sender, parameters in self._sent:
            own, first = sender == dist.get_rank(), parameters[0].detach()
            if len(parameters) == 1 and first.is_contiguous():
                flat = first
            elif own:
                flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            else:
                flat = first.new_empty(sum(parameter.numel() for parameter in parameters))
            work = dist.broadcast(flat, src=sender, group=group, async_op=True)
            assert work is not None
            pending.append((work, flat, [] if own or flat is first else parameters))
            if len(pending) > _MOST_PENDING:
                _receive(*pending.popleft())
        for arrival in pending:
            _receive(*arrival)


def _receive(work: dist.Work, flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    work.wait()
    if parameters:
        parts = flat.split([parameter.numel() for parameter in parameters])
        views = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        torch._foreach_copy_([parameter.detach() for parameter in parameters], views)


def _parts(parameters: Sequence[nn.Parameter], ranks: int) -> list[list[nn.Parameter]]:
    """The parameters of each rank."""
    parts: list[list[nn.Parameter]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        least = sizes.index(min(sizes))
        parts[least].append(parameter)
        sizes[least] += parameter.numel()
    return parts
