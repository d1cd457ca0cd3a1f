"""Which rank holds which experts, from numbers alone: checked and drawn before any process exists.

world = replicas × expert_parallel. Consecutive ranks make an expert group, which holds every expert once; ranks that
stand at the same place of different groups are replicas of one another. So groups stay inside a node wherever they fit,
and what crosses nodes is the reduction of gradients between replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.errors import ConfigError, plural
from moe_train.parallel.traffic import LinkType


@dataclass(frozen=True)
class LayoutPlan:
    """The numbers of a layout; :func:`plan_layout` checks them.

    Attributes:
        world: ranks in all.
        expert_parallel: ranks of an expert group.
        ranks_per_node: ranks of a node; the world where there is one node.
        two_level: exchange node by node, then rank by rank, where a group spans nodes.
    """

    world: int
    expert_parallel: int
    ranks_per_node: int
    two_level: bool = False

    @property
    def replicas(self) -> int:
        """Expert groups, and so copies of each expert."""
        return self.world // self.expert_parallel

    @property
    def nodes_per_group(self) -> int:
        """Nodes that an expert group spans (1: it stands inside one)."""
        return max(1, self.expert_parallel // self.ranks_per_node)

    @property
    def exchanges_by_node(self) -> bool:
        """Whether tokens travel in two steps: there are several nodes in a group, and it was asked for."""
        return self.two_level and self.nodes_per_group > 1

    def place(self, rank: int) -> int:
        """Place of a rank in its expert group."""
        return rank % self.expert_parallel

    def node(self, rank: int) -> int:
        """Node of a rank."""
        return rank // self.ranks_per_node

    def group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the rank's expert group."""
        first = rank - self.place(rank)
        return tuple(range(first, first + self.expert_parallel))

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same experts as this one, itself included."""
        return tuple(range(self.place(rank), self.world, self.expert_parallel))

    def node_peers(self, rank: int) -> tuple[int, ...]:
        """Ranks of the rank's expert group that stand on its node."""
        return tuple(r for r in self.group(rank) if self.node(r) == self.node(rank))

    def across_peers(self, rank: int) -> tuple[int, ...]:
        """One rank per node of the group: those at the same place of their node as this one."""
        local = rank % self.ranks_per_node
        return tuple(r for r in self.group(rank) if r % self.ranks_per_node == local)

    def link(self, rank: int, other: int) -> LinkType:
        """What lies between two ranks."""
        if rank == other:
            return "local"
        return "node" if self.node(rank) == self.node(other) else "across"

    def experts(self, rank: int, num_experts: int) -> range:
        """Global ids of the experts that a rank holds, of a layer with ``num_experts``.

        Raises:
            ConfigError: they cannot be divided over the group.
        """
        self.check_experts(num_experts)
        each = num_experts // self.expert_parallel
        return range(self.place(rank) * each, (self.place(rank) + 1) * each)

    def check_experts(self, num_experts: int) -> None:
        """Raises ConfigError unless every rank of a group gets the same number of experts."""
        if num_experts % self.expert_parallel:
            raise ConfigError(
                f"{num_experts} experts cannot be divided over layout.expert_parallel={self.expert_parallel} ranks",
                remedy=_offer("layout.expert_parallel", self.working_sizes(num_experts)),
            )

    def working_sizes(self, num_experts: int) -> tuple[int, ...]:
        """Values of ``expert_parallel`` that this world and number of experts allow."""
        return tuple(
            n for n in _divisors(self.world) if num_experts % n == 0 and _fits_nodes(n, self.ranks_per_node, self.world)
        )

    def split_groups(self, num_experts: int, num_groups: int) -> str | None:
        """A warning where a SAM group of experts would be torn over ranks, and so lose its one row per token."""
        per_rank, per_group = num_experts // self.expert_parallel, num_experts // num_groups
        if per_rank % per_group == 0:
            return None
        per_node = per_rank * min(self.ranks_per_node, self.expert_parallel)
        if self.exchanges_by_node and per_node % per_group == 0:
            return None
        return (
            f"the {num_groups} groups of {per_group} experts are split over ranks that hold {per_rank}: the same"
            " function is computed, but a token may travel to several ranks; groups stay whole with"
            " layout.expert_parallel up to"
            f" {max((n for n in self.working_sizes(num_experts) if num_groups % n == 0), default=1)}"
        )

    def picture(self, num_experts: int) -> str:
        """One line a rank: its node, its expert group, its experts; replicas stand under one another."""
        lines = [
            f"{plural(self.world, 'rank')} = {in_words(self.replicas, self.expert_parallel)}"
            f" ({num_experts} experts, {num_experts // self.expert_parallel} a rank)"
        ]
        width = len(str(self.world - 1))
        for rank in range(self.world):
            if rank % self.ranks_per_node == 0:
                lines.append(f"node {self.node(rank)}")
            held = self.experts(rank, num_experts)
            span = f"{held[0]}" if len(held) == 1 else f"{held[0]}-{held[-1]}"
            lines.append(f"  rank {rank:>{width}}  group {rank // self.expert_parallel}  experts {span}")
        return "\n".join(lines)


def in_words(replicas: int, expert_parallel: int) -> str:
    """Such as ``8 replicas x 4 expert-parallel``."""
    return f"{plural(replicas, 'replica')} x {expert_parallel} expert-parallel"


def plan_layout(
    world: int,
    ranks_per_node: int,
    expert_parallel: int,
    num_experts: int | Sequence[int],
    two_level: bool = False,
) -> LayoutPlan:
    """Checks a layout from its numbers.

    Args:
        world: ranks in all.
        ranks_per_node: ranks of each node; may exceed the world (then there is one node).
        expert_parallel: ranks over which the experts of a layer are divided.
        num_experts: experts of a layer, or of each layer where they differ.
        two_level: exchange between nodes first and inside the node then, where a group spans nodes.

    Raises:
        ConfigError: it cannot be; the message names the sizes that can.
    """
    per_node = min(ranks_per_node, world)
    plan = LayoutPlan(world, expert_parallel, per_node, two_level)
    counts = [num_experts] if isinstance(num_experts, int) else list(num_experts)
    working = set(_divisors(world)).intersection(*(plan.working_sizes(count) for count in counts))
    offer = _offer("layout.expert_parallel", sorted(working))
    if world < 1 or ranks_per_node < 1 or expert_parallel < 1:
        raise ConfigError("world, ranks per node and layout.expert_parallel must be 1 or more")
    if world % per_node:
        raise ConfigError(
            f"{world} ranks are not whole nodes of {per_node}",
            remedy="give every node the same number of ranks",
        )
    if expert_parallel > world:
        ranks = plural(world, "rank")
        raise ConfigError(f"layout.expert_parallel={expert_parallel} is above the {ranks}", remedy=offer)
    if world % expert_parallel:
        raise ConfigError(f"layout.expert_parallel={expert_parallel} does not divide {world} ranks", remedy=offer)
    if not _fits_nodes(expert_parallel, per_node, world):
        raise ConfigError(
            f"layout.expert_parallel={expert_parallel} neither divides a node's {per_node} ranks nor fills whole nodes",
            remedy=offer,
        )
    for count in counts:
        if count % expert_parallel:
            raise ConfigError(
                f"{count} experts cannot be divided over layout.expert_parallel={expert_parallel} ranks", remedy=offer
            )
    return plan


def _fits_nodes(size: int, per_node: int, world: int) -> bool:
    per_node = min(per_node, world)
    return per_node % size == 0 or size % per_node == 0


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _offer(key: str, values: Sequence[int]) -> str:
    if not values:
        return "change the number of experts or of ranks"
    return f"set {key} to {', '.join(map(str, values[:-1]))}{' or ' if values[1:] else ''}{values[-1]}"
