"""Sums the gradients of experts over their replicas while backward computes further gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.parallel.gradients import LocalNorms, in_buckets


@dataclass
class _Bucket:
    """Gradients that are reduced together: ``flat`` holds them one after the other."""

    leaves: list[nn.Parameter]
    flat: Tensor
    missing: int
    work: dist.Work | None = None


class ReplicaGradients:
    """Flat fp32 buckets that the gradients of parameters are views of, reduced over a process group.

    A bucket's all-reduce starts as soon as the last micro-batch's backward has given all its gradients and the buckets
    before it have started. So every rank starts them in the same order, whatever the order of its gradients.

    Args:
        leaves: tensor whose gradient backward computes → parameter: itself, or the fp32 parameter of a 16-bit copy.
        group: ranks with the same parameters.
        bucket_bytes: about the size of a bucket.

    Attributes:
        last: whether the micro-batch that is computed is the last one of the update.
        views: parameter → its part of a bucket.
        norms: of this rank's gradients, before they are reduced.
    """

    def __init__(
        self, leaves: Mapping[nn.Parameter, nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int
    ) -> None:
        self.last, self.norms = True, LocalNorms()
        self.views: dict[nn.Parameter, Tensor] = {}
        self._group, self._parameters = group, dict(leaves)
        self._buckets: list[_Bucket] = []
        self._of: dict[nn.Parameter, _Bucket] = {}
        self._started = 0
        if dist.get_world_size(group) == 1:
            return
        by_parameter = {parameter: leaf for leaf, parameter in leaves.items()}
        for parameters in in_buckets([p for p in by_parameter if p.requires_grad], bucket_bytes):
            flat = parameters[0].new_zeros(sum(p.numel() for p in parameters), requires_grad=False)
            bucket = _Bucket([by_parameter[p] for p in parameters], flat, len(parameters))
            self._buckets.append(bucket)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                self.views[parameter] = part.view_as(parameter)
            for leaf in bucket.leaves:
                self._of[leaf] = bucket
                leaf.register_post_accumulate_grad_hook(self._computed)

    def _computed(self, leaf: Tensor) -> None:
        assert isinstance(leaf, nn.Parameter)
        self._settle(leaf)
        if self.last:
            self._of[leaf].missing -= 1
            while self._started < len(self._buckets) and not self._buckets[self._started].missing:
                self._start()

    @torch.no_grad()
    def _settle(self, leaf: nn.Parameter) -> None:
        """Makes the parameter's gradient a view of the bucket, with the gradient of a 16-bit copy added."""
        parameter = self._parameters[leaf]
        view = self.views[parameter]
        if parameter.grad is not view:
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            elif leaf.grad is not None:
                view.copy_(leaf.grad)
                leaf.grad = None
            else:
                view.zero_()
            parameter.grad = view
        if leaf is not parameter and leaf.grad is not None:
            view.add_(leaf.grad)
            leaf.grad = None

    def _start(self) -> None:
        bucket = self._buckets[self._started]
        self.norms.record([bucket.flat])
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        self._started += 1

    def finish(self) -> None:
        """Waits for the sums. A parameter without a gradient gets zeros."""
        if not self._buckets:
            for parameter in filter(lambda p: p.requires_grad, self._parameters.values()):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.norms.record([parameter.grad])
        for bucket in self._buckets[self._started :]:
            for leaf in bucket.leaves:
                self._settle(leaf)
        while self._started < len(self._buckets):
            self._start()
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work, bucket.missing = None, len(bucket.leaves)
        self._started = 0
