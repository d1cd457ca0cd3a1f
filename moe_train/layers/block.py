"""Base class of feed-forward blocks (dense or sparse) of a Transformer layer, and the records of their routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_train.experts import ExpertPool
from moe_train.kernels.device_kernels import DeviceKernels
from moe_train.layers.batch_context import BatchContext
from moe_train.routing.balance_losses import WorldSums
from moe_train.routing.base import Router
from moe_train.routing.context import RankReduction
from moe_train.routing.types import AuxiliaryLoss, RouterLoss, Routing, RoutingStatistics


@dataclass(frozen=True)
class RoutingRecord:
    """Losses, statistics and routing of one sparse block in one forward, as a return value.

    Attributes:
        layer: number of the sparse block in the model, encoder first.
        router_losses: by name, as the block returns them.
        statistics: additive counts.
        routing: outputs of its routers in order (one, or one per stratum; empty with soft routing).
        world: sums over the ranks for the losses of all records of the forward (:func:`start_losses`).
    """

    layer: int
    router_losses: Mapping[str, RouterLoss]
    statistics: RoutingStatistics
    routing: tuple[Routing, ...] = ()
    world: WorldSums | None = None

    @cached_property
    def losses(self) -> Mapping[str, AuxiliaryLoss]:
        """By name; this rank's shares. The first record that is asked waits for the sums over the ranks.

        Raises:
            ValueError: the sums over the ranks were never started.
        """
        if self.world is None:
            raise ValueError(f"losses of sparse block {self.layer} need start_losses first")
        return {name: AuxiliaryLoss(loss.share(self.world), loss.weight) for name, loss in self.router_losses.items()}

    @property
    def total_loss(self) -> Tensor:
        """0-dim: Σ weight · value of this rank's auxiliary losses."""
        total = torch.zeros((), device=self.statistics.load.device)
        for loss in self.losses.values():
            total = total + loss.weight * loss.value
        return total


Records = tuple[RoutingRecord, ...]


def start_losses(records: Records, ranks: RankReduction) -> Records:
    """The records of a forward, once the all-reduce for the losses of all of them has started.

    A model calls it at the end of its forward, on every rank: not in the layers, which activation recomputation runs
    again.
    """
    world = WorldSums([loss for record in records for loss in record.router_losses.values()], ranks)
    return tuple(dataclasses.replace(record, world=world) for record in records)


@dataclass(frozen=True)
class Observation:
    """Inputs of a sparse block's router for T tokens, for analysis.

    Attributes:
        states: [T, d] inputs of the router; with strata, of the first gate, which gets every token.
        passes: [T] int64, number of passes of each token; None without strata.
        mixes: dispatch and combine weights, [B, S, s] each; None without slots.
    """

    states: Tensor
    passes: Tensor | None = None
    mixes: tuple[Tensor, Tensor] | None = None


class Block(nn.Module):
    """A dense or sparse feed-forward: ``forward(x [B, S, d], context) -> (y [B, S, d], record or None)``.

    Attributes:
        owns_residual: y already contains x, and the block has its own norms; the Transformer layer adds nothing.
        owns_norm: the block normalises its input (X-MoE's experts); the Transformer layer adds the residual only.
    """

    owns_residual: ClassVar[bool] = False
    owns_norm: bool = False

    def forward(self, x: Tensor, context: BatchContext) -> tuple[Tensor, RoutingRecord | None]:
        """See the class."""
        raise NotImplementedError

    def set_kernels(self, kernels: DeviceKernels) -> None:
        """Sets the Triton kernels that router and experts use."""
        for part in self.modules():
            if isinstance(part, (Router, ExpertPool)):
                part.kernels = kernels

    def compile_routing(self, backend: str) -> None:
        """Compiles router and row plan, once for all shapes and updates."""
        for part in self.modules():
            if isinstance(part, Router):
                part.compile(dynamic=True, backend=backend)
            elif isinstance(part, ExpertPool):
                part.compile_plan(backend)

    def observe(self, x: Tensor, context: BatchContext, record: RoutingRecord) -> Observation:
        """The router's inputs in a forward on x [B, S, d] that returned ``record``."""
        return Observation(context.pack(x))
