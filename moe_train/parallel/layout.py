"""Expert layout of a running job: the plan, this process's rank, and process groups over torch's DeviceMesh."""

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
        plan: sizes of the layout.
        rank: rank of this process.
        mesh: (replica, expert), or (replica, node, local) with two-level dispatch; None for a single process.
        counters: traffic sent by this process.
        force_dispatch: run the all-to-alls with one rank too (to measure them).
        options: options of the dispatch.
    """

    plan: LayoutPlan
    rank: int = 0
    mesh: DeviceMesh | None = None
    counters: TrafficCounters = field(default_factory=TrafficCounters)
    force_dispatch: bool = False
    options: DispatchOptions = field(default_factory=DispatchOptions)

    @classmethod
    def local(cls) -> ExpertLayout:
        """Layout of a single process that holds all experts."""
        return cls(LayoutPlan(1, 1, 1))

    @classmethod
    def build(
        cls,
        plan: LayoutPlan,
        device_type: str = "cpu",
        force_dispatch: bool = False,
        options: DispatchOptions | None = None,
    ) -> ExpertLayout:
        """Creates the process groups. A collective: every rank of the default group must call it, in the same order.

        Raises:
            LaunchError: the world size is not the planned one.
        """
        running = dist.get_world_size() if dist.is_initialized() else 1
        if running != plan.world:
            raise LaunchError(f"the layout was planned for {plan.world} ranks and {running} are running")
        if not dist.is_initialized():
            return cls(plan)
        shape: tuple[int, ...] = (plan.replicas, plan.expert_parallel)
        names: tuple[str, ...] = ("replica", "expert")
        if plan.dispatches_by_node:
            shape = (plan.replicas, plan.nodes_per_group, plan.ranks_per_node)
            names = ("replica", "node", "local")
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        check_peers()
        return cls(plan, dist.get_rank(), mesh, TrafficCounters(), force_dispatch, options or DispatchOptions())

    @property
    def needs_dispatch(self) -> bool:
        """Whether tokens pass through all-to-alls."""
        return self.plan.expert_parallel > 1 or (self.force_dispatch and self.mesh is not None)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same experts as this one; None for a single process."""
        return None if self.mesh is None else self.mesh.get_group("replica")

    @cached_property
    def expert_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups to reduce over, one after the other, for a sum over the expert group."""
        if self.mesh is None:
            return ()
        names = ("local", "node") if self.plan.dispatches_by_node else ("expert",)
        return tuple(self.mesh.get_group(name) for name in names)

    def dispatch_levels(self, num_experts: int) -> tuple[DispatchLevel, ...]:
        """Dispatch levels of a layer with ``num_experts``; empty if all experts are local.

        One level: the ranks of the expert group. Two levels: one rank per node, then the ranks of the node.
        """
        if not self.needs_dispatch:
            return ()
        held = len(self.experts(num_experts))
        if self.plan.dispatches_by_node:
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
        """Global ids of the local experts of a layer with ``num_experts``."""
        return self.plan.experts(self.rank, num_experts)
