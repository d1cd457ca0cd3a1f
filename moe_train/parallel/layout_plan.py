"""Which rank holds which experts, computed from sizes alone, so that it can be checked before any process starts.

world = replicas × expert_parallel. Consecutive ranks form an expert group, which holds every expert once; ranks at the
same index of different groups are replicas of each other. So groups stay inside a node where they fit, and traffic
between nodes is the gradient reduction between replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.errors import ConfigError, plural
from moe_train.parallel.traffic import LinkType


@dataclass(frozen=True)
class LayoutPlan:
    """Sizes of a layout; :func:`plan_layout` checks them.

    Attributes:
        world: number of ranks.
        expert_parallel: ranks per expert group.
        ranks_per_node: ranks per node; the world size if there is one node.
        two_level: dispatch between nodes first, then inside the node, if a group spans nodes.
    """

    world: int
    expert_parallel: int
    ranks_per_node: int
    two_level: bool = False

    @property
    def replicas(self) -> int:
        """Number of expert groups, which is the number of copies of each expert."""
        return self.world // self.expert_parallel

    @property
    def nodes_per_group(self) -> int:
        """Nodes that an expert group spans (1: it fits in one)."""
        return max(1, self.expert_parallel // self.ranks_per_node)

    @property
    def dispatches_by_node(self) -> bool:
        """Whether dispatch has two levels: ``two_level`` is set and a group spans several nodes."""
        return self.two_level and self.nodes_per_group > 1

    def index_in_group(self, rank: int) -> int:
        """Index of a rank in its expert group."""
        return rank % self.expert_parallel

    def node(self, rank: int) -> int:
        """Node of a rank."""
        return rank // self.ranks_per_node

    def group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the rank's expert group."""
        first = rank - self.index_in_group(rank)
        return tuple(range(first, first + self.expert_parallel))

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same experts as this one, including itself."""
        return tuple(range(self.index_in_group(rank), self.world, self.expert_parallel))

    def node_peers(self, rank: int) -> tuple[int, ...]:
        """Ranks of the rank's expert group on the same node."""
        return tuple(r for r in self.group(rank) if self.node(r) == self.node(rank))

    def across_peers(self, rank: int) -> tuple[int, ...]:
        """One rank per node of the group: those with the same local rank as this one."""
        local = rank % self.ranks_per_node
        return tuple(r for r in self.group(rank) if r % self.ranks_per_node == local)

    def link(self, rank: int, other: int) -> LinkType:
        """Type of link between two ranks."""
        if rank == other:
            return "local"
        return "node" if self.node(rank) == self.node(other) else "across"

    def experts(self, rank: int, num_experts: int) -> range:
        """Global ids of the experts that a rank holds of a layer with ``num_experts``.

        Raises:
            ConfigError: ``num_experts`` is not divisible by ``expert_parallel``.
        """
        self.check_experts(num_experts)
        each = num_experts // self.expert_parallel
        return range(self.index_in_group(rank) * each, (self.index_in_group(rank) + 1) * each)

    def check_experts(self, num_experts: int) -> None:
        """Raises ConfigError unless ``num_experts`` is divisible by ``expert_parallel``."""
        if num_experts % self.expert_parallel:
            raise ConfigError(
                f"{num_experts} experts cannot be divided over layout.expert_parallel={self.expert_parallel} ranks",
                remedy=_offer("layout.expert_parallel", self.working_sizes(num_experts)),
            )

    def working_sizes(self, num_experts: int) -> tuple[int, ...]:
        """Values of ``expert_parallel`` that are valid for this world size and number of experts."""
        return tuple(
            n for n in _divisors(self.world) if num_experts % n == 0 and _fits_nodes(n, self.ranks_per_node, self.world)
        )

    def split_groups(self, num_experts: int, num_groups: int) -> str | None:
        """A warning if a SAM group of experts is split over ranks, so that a token may need more than one row."""
        per_rank, per_group = num_experts // self.expert_parallel, num_experts // num_groups
        if per_rank % per_group == 0:
            return None
        per_node = per_rank * min(self.ranks_per_node, self.expert_parallel)
        if self.dispatches_by_node and per_node % per_group == 0:
            return None
        return (
            f"the {num_groups} groups of {per_group} experts are split over ranks that hold {per_rank}: the same"
            " function is computed, but a token may be sent to several ranks; groups are not split with"
            " layout.expert_parallel up to"
            f" {max((n for n in self.working_sizes(num_experts) if num_groups % n == 0), default=1)}"
        )

    def describe(self, num_experts: int) -> str:
        """A text with one line per rank: its expert group and its experts, listed by node."""
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
    """For example ``8 replicas x 4 expert-parallel``."""
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
        world: number of ranks.
        ranks_per_node: ranks per node; may exceed the world (then there is one node).
        expert_parallel: ranks over which the experts of a layer are divided.
        num_experts: experts per layer, or of each layer if they differ.
        two_level: dispatch between nodes first, then inside the node, if a group spans nodes.

    Raises:
        ConfigError: the layout is invalid; the message names the valid sizes.
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
