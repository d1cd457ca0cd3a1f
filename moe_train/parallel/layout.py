"""A layout on a running world: the plan, this process's rank, and the process groups, over torch's DeviceMesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_train.errors import LaunchError
from moe_train.parallel.all_to_all import CommGroup
from moe_train.parallel.dispatch_options import DispatchOptions
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.peer_check import check_peers
from moe_train.parallel.split_sizes import DispatchLevel
from moe_train.parallel.traffic import TrafficCounters


@dataclass(frozen=True)
class ExpertLayout:
    """world = replicas × expert_parallel, seen from one rank.

    Attributes:
        plan: the numbers.
        rank: this process.
        mesh: (replica, expert), or (replica, node, local) where tokens travel node by node; None for one process alone.
        counters: what the layers of this process have sent.
        force_dispatch: go through the all-to-alls with one rank too (to measure them).
        options: how tokens are dispatched.
    """

    plan: LayoutPlan
    rank: int = 0
    mesh: DeviceMesh | None = None
    counters: TrafficCounters = field(default_factory=TrafficCounters)
    force_dispatch: bool = False
    options: DispatchOptions = field(default_factory=DispatchOptions)

    @classmethod
    def alone(cls) -> ExpertLayout:
        """One process that holds all experts."""
        return cls(LayoutPlan(1, 1, 1))

    @classmethod
    def build(
        cls,
        plan: LayoutPlan,
        device_type: str = "cpu",
        force_dispatch: bool = False,
        options: DispatchOptions | None = None,
    ) -> ExpertLayout:
        """Makes the process groups. Every rank of the initialised default group must call it, in the same order.

        Raises:
            LaunchError: the running world is not the planned one.
        """
        running = dist.get_world_size() if dist.is_initialized() else 1
        if running != plan.world:
            raise LaunchError(f"the layout was planned for {plan.world} ranks and {running} are running")
        if not dist.is_initialized():
            return cls(plan)
        shape: tuple[int, ...] = (plan.replicas, plan.expert_parallel)
        names: tuple[str, ...] = ("replica", "expert")
        if plan.exchanges_by_node:
            shape = (plan.replicas, plan.nodes_per_group, plan.ranks_per_node)
            names = ("replica", "node", "local")
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        check_peers()
        return cls(plan, dist.get_rank(), mesh, TrafficCounters(), force_dispatch, options or DispatchOptions())

    @property
    def exchanges(self) -> bool:
        """Whether tokens leave this process at all."""
        return self.plan.expert_parallel > 1 or (self.force_dispatch and self.mesh is not None)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same experts as this one; None for one process alone."""
        return None if self.mesh is None else self.mesh.get_group("replica")

    @cached_property
    def expert_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups whose reductions, one after the other, sum over the ranks that divide the experts."""
        if self.mesh is None:
            return ()
        names = ("local", "node") if self.plan.exchanges_by_node else ("expert",)
        return tuple(self.mesh.get_group(name) for name in names)

    def dispatch_levels(self, num_experts: int) -> tuple[DispatchLevel, ...]:
        """The levels that a token passes to its experts, of a layer with ``num_experts``: none where all are held here.

        One: the ranks among which the experts are divided. Two: one rank on each node, then the ranks of the node.
        """
        if not self.exchanges:
            return ()
        held = len(self.experts(num_experts))
        if self.plan.exchanges_by_node:
            across = self._group("node", self.plan.across_peers(self.rank))
            inside = self._group("local", self.plan.node_peers(self.rank))
            return DispatchLevel(across, held * self.plan.ranks_per_node), DispatchLevel(inside, held)
        return (DispatchLevel(self._group("expert", self.plan.group(self.rank)), held),)

    def _group(self, name: str, ranks: tuple[int, ...]) -> CommGroup:
        if self.mesh is None:
            raise LaunchError("a dispatch between ranks needs torch.distributed", remedy="start under torchrun")
        links = tuple(self.plan.link(self.rank, other) for other in ranks)
        return CommGroup(self.mesh.get_group(name), links, self.counters)

    def experts(self, num_experts: int) -> range:
        """Global ids of the experts held here, of a layer with ``num_experts``."""
        return self.plan.experts(self.rank, num_experts)
