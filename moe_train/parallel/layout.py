"""A layout come to life: the plan, this process's rank, and the process groups, over torch's DeviceMesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_train.errors import LaunchError
from moe_train.parallel.counters import TrafficCounters
from moe_train.parallel.flights import Peers
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.options import ExchangeOptions


@dataclass(frozen=True)
class ExpertLayout:
    """world = replicas × expert_parallel, seen from one rank.

    Attributes:
        plan: the numbers.
        rank: this process.
        mesh: (replica, expert), or (replica, node, local) where tokens travel node by node; None for one process alone.
        counters: what the exchanges of this process have sent.
        force_exchange: take the way through the exchange with one rank too (to measure it).
        options: how exchanges are carried out.
    """

    plan: LayoutPlan
    rank: int = 0
    mesh: DeviceMesh | None = None
    counters: TrafficCounters = field(default_factory=TrafficCounters)
    force_exchange: bool = False
    options: ExchangeOptions = field(default_factory=ExchangeOptions)

    @classmethod
    def alone(cls) -> ExpertLayout:
        """One process that holds all experts."""
        return cls(LayoutPlan(1, 1, 1))

    @classmethod
    def build(
        cls,
        plan: LayoutPlan,
        device_type: str = "cpu",
        force_exchange: bool = False,
        options: ExchangeOptions | None = None,
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
        return cls(plan, dist.get_rank(), mesh, TrafficCounters(), force_exchange, options or ExchangeOptions())

    @property
    def exchanges(self) -> bool:
        """Whether tokens leave this process at all."""
        return self.plan.expert_parallel > 1 or (self.force_exchange and self.mesh is not None)

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

    @cached_property
    def expert_peers(self) -> Peers:
        """The ranks among which all experts are divided, for an exchange in one step."""
        return self._peers("expert", self.plan.group(self.rank))

    @cached_property
    def node_peers(self) -> Peers:
        """One rank on each node of the expert group: the first of two steps."""
        return self._peers("node", self.plan.across_peers(self.rank))

    @cached_property
    def local_peers(self) -> Peers:
        """The expert group's ranks on this node: the second of two steps."""
        return self._peers("local", self.plan.node_peers(self.rank))

    def _peers(self, name: str, ranks: tuple[int, ...]) -> Peers:
        if self.mesh is None:
            raise LaunchError("an exchange between ranks needs torch.distributed", remedy="start under torchrun")
        links = tuple(self.plan.link(self.rank, other) for other in ranks)
        return Peers(self.mesh.get_group(name), links, self.counters)

    def experts(self, num_experts: int) -> range:
        """Global ids of the experts held here, of a layer with ``num_experts``."""
        return self.plan.experts(self.rank, num_experts)
