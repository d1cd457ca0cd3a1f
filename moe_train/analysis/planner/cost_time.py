"""The time of a training step, estimated from FLOPs, bytes and messages. Every term is one line of arithmetic.

- products: FLOPs / (peak · efficiency), backward twice forward, forward once more where it is recomputed; experts at
  the load of the most loaded rank;
- an all-to-all: latency + messages · members + the slower of what a rank sends inside its node over the rank's
  bandwidth and what a node sends to others over the node's; payloads move four times (out, back, and their gradients);
- gradients: rings, the slower of the rank's and the node's share; with ``overlap`` hidden behind backward's products;
- the optimizer: every state read and written once at the memory's bandwidth.

Nothing else overlaps: an exchange and the computation of its layer are sequential.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.analysis.planner.cost_memory import StateSharding
from moe_train.analysis.planner.cost_rows import Flow
from moe_train.analysis.planner.cost_shape import ModelShape, SparseShape
from moe_train.analysis.planner.cost_traffic import (
    BYTES,
    PAIR,
    WEIGHT,
    StepTraffic,
    Workload,
    count_bytes,
    ring_crossings,
)
from moe_train.config.planner import ClusterConfig
from moe_train.parallel.layout_plan import LayoutPlan

_BACKWARD = 2


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step's parts on the most loaded rank.

    Attributes:
        dense: attention, dense feed-forwards, output.
        experts: products of experts, at the most loaded rank.
        routers: scores of all experts for every token.
        exchange_node, exchange_across: payload and metadata of all exchanges, by the slower link.
        exchange_latency: time of exchanges independent of their size.
        gradients: reductions, except for the part overlapped with backward.
        optimizer: the optimizer step.
    """

    dense: float
    experts: float
    routers: float
    exchange_node: float
    exchange_across: float
    exchange_latency: float
    gradients: float
    optimizer: float

    @property
    def exchange(self) -> float:
        """Total time of exchanges."""
        return self.exchange_node + self.exchange_across + self.exchange_latency

    @property
    def total(self) -> float:
        """Time of the step."""
        return sum(vars(self).values())


def time_plan(
    shape: ModelShape,
    plan: LayoutPlan,
    work: Workload,
    traffic: StepTraffic,
    cluster: ClusterConfig,
    sharding: StateSharding,
    overlap: bool = True,
) -> TimePlan:
    """The parts of a step."""
    rate = cluster.tflops * 1e12 * cluster.efficiency
    dense = work.micro_batches * dense_flops(shape, work) / rate
    experts, routers = (work.micro_batches * flops / rate for flops in sparse_flops(shape, plan, work))
    moved = [
        _block_exchange(block, b.flows, b.tokens, plan, work, cluster)
        for block, b in zip(shape.sparse, traffic.blocks, strict=True)
    ]
    node, across, latency = (
        (work.micro_batches * sum(parts) for parts in zip(*moved, strict=True)) if moved else (0.0,) * 3
    )
    reduction = gradient_seconds(shape, plan, cluster, sharding, work)
    hidden = _BACKWARD / (_BACKWARD + work.forwards) * dense / work.micro_batches if overlap else 0.0
    states = sharding.optimizer_bytes + 4 + 4
    sharded = plan.world if sharding.zero_stage else 1
    updated = shape.dense_parameters / sharded + shape.expert_parameters / plan.expert_parallel / (
        plan.replicas if sharding.zero_stage else 1
    )
    optimizer = 2.0 * updated * states / (cluster.memory_bandwidth * 1e9)
    return TimePlan(dense, experts, routers, node, across, latency, max(0.0, reduction - hidden), optimizer)


def dense_flops(shape: ModelShape, work: Workload) -> float:
    """Of one rank and micro-batch, forward and backward: products with dense weights, and attention's scores.

    Scores cost 4 d S per token and attention, forward, whether masked or not.
    """
    d, total = shape.config.embed_dim, 0.0
    for stack in shape.stacks:
        scores = stack.layers * (2 if stack.cross else 1) * 4.0 * d * work.sentence_tokens
        total += work.tokens_of(stack, shape) * (work.forwards + _BACKWARD) * (stack.flops + scores)
    return total + work.tokens * shape.passes * (1 + _BACKWARD) * shape.output_flops


def sparse_flops(shape: ModelShape, plan: LayoutPlan, work: Workload) -> tuple[float, float]:
    """Of one micro-batch, forward and backward: experts' on the most loaded rank, and routers'."""
    experts = routers = 0.0
    for stack in shape.stacks:
        tokens = work.tokens_of(stack, shape) * (work.forwards + _BACKWARD)
        for block in stack.sparse:
            experts += (
                tokens * block.pairs * block.spec.flops_per_row * max_over_mean(block, plan.expert_parallel, work)
            )
            routers += tokens * block.router.router_flops_per_token(block.routing, block.spec.dim)
    return experts, routers


def max_over_mean(block: SparseShape, parts: int, work: Workload) -> float:
    """Rows of the most loaded rank (or node) over the mean: by the strategy, by the given loads, and the given skew."""
    if parts == 1:
        return 1.0
    factor = work.skew * parts * block.router.max_load_share(block.routing, parts)
    if work.load is not None:
        each = block.num_experts // parts
        held = [sum(work.load[part * each : (part + 1) * each]) for part in range(parts)]
        factor *= max(held) / sum(held) * parts
    return factor


def _block_exchange(
    block: SparseShape, flows: Sequence[Flow], tokens: float, plan: LayoutPlan, work: Workload, cluster: ClusterConfig
) -> tuple[float, float, float]:
    """Seconds over the node's links, between nodes, and of latency: forward, recomputation and backward."""
    row = block.spec.dim * BYTES[work.precision]
    payloads = 2 * (work.forwards + 1)
    of_rank, of_node = (max_over_mean(block, parts, work) for parts in (plan.expert_parallel, plan.nodes_per_group))
    calls = len({choice.stage for choice in block.router.expected_choices(block.routing)})
    node = across = latency = 0.0
    for flow, counts in zip(flows, count_bytes(flows, block.num_experts), strict=True):
        sent = {
            link: tokens * (payloads * flow.rows[link] * row + flow.pairs[link] * (work.forwards * PAIR + WEIGHT))
            + work.forwards * calls * counts * flow.peers[link]
            for link in flow.rows
        }
        ranks = min(plan.ranks_per_node, plan.world)
        by_node = of_rank * sent["node"] / (cluster.bandwidth_node * 1e9)
        by_across = of_node * sent["across"] * ranks / (cluster.bandwidth_across * 1e9)
        node, across = (
            node + (by_node if by_node >= by_across else 0.0),
            across + (by_across if by_across > by_node else 0.0),
        )
        latency += calls * _exchange_latency(flow, work, cluster)
    return node, across, latency + (calls * (work.forwards + 1) * cluster.layer_overhead * 1e-6 if flows else 0.0)


def _exchange_latency(flow: Flow, work: Workload, cluster: ClusterConfig) -> float:
    """All-to-alls of one step: counts, indices, rows, weights, rows back; backward twice rows, and weights."""
    start = cluster.latency_across if flow.peers["across"] else cluster.latency_node
    members = sum(flow.peers.values())
    return (5 * work.forwards + 3) * (start + members * cluster.message) * 1e-6


def gradient_seconds(
    shape: ModelShape, plan: LayoutPlan, cluster: ClusterConfig, sharding: StateSharding, work: Workload
) -> float:
    """Reduction of fp32 gradients by rings.

    Rings of dense parameters span the world, those of experts their replicas; the latter share the links between nodes.
    With ZeRO-1 of engine ddp parameters are sent after an all-reduce; DeepSpeed reduces a gradient to one rank only.
    With ZeRO-3 every micro-batch gathers 16-bit parameters twice and scatters their gradients once.
    """
    nodes = plan.world // min(plan.ranks_per_node, plan.world)
    moved = 2 * 4 if sharding.zero_stage < 3 else 3 * 2 * work.micro_batches
    if sharding.name == "ddp" and sharding.zero_stage == 1:
        moved += 4
    experts = shape.expert_parameters / plan.expert_parallel
    world = tuple(range(plan.world))
    total = 0.0
    for parameters, ring, rings in (
        (shape.dense_parameters, world, 1),
        (experts, plan.replicas_of(0), plan.expert_parallel),
    ):
        volume = moved * (len(ring) - 1) / len(ring) * parameters
        edges = ring_crossings(plan, ring)
        inside = volume / (cluster.bandwidth_node * 1e9)
        crossing = volume * edges * rings / nodes / (cluster.bandwidth_across * 1e9)
        latency = cluster.latency_across if edges else cluster.latency_node
        total += max(inside, crossing) + 2 * math.log2(len(ring)) * latency * 1e-6
    return total
