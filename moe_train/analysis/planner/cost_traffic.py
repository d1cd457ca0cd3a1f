"""Predicts rows and bytes that a training step sends, by link: exchange of tokens, and reduction of gradients.

Per sparse block and micro-batch, as counted in :mod:`moe_train.parallel.dispatch`:

- payload: a row out and a row back forward, the same backward; forward again where activations are recomputed;
- metadata: 4 + 4 bytes of numbers and 4 of weight per pair forward, 4 per pair backward, and for each member of the
  group, forward, 8-byte counts: its rows and the pairs of each of its experts (a node's: also the rows of each rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moe_train.analysis.planner.cost_rows import Flow, expected_flows
from moe_train.analysis.planner.cost_shape import ModelShape, SparseShape, StackShape
from moe_train.parallel.layout_plan import LayoutPlan
from moe_train.parallel.traffic import LINKS, LinkType

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
WEIGHT = 4
PAIR = 4 + 4 + WEIGHT
COUNT = 8


@dataclass(frozen=True)
class Workload:
    """The work of one rank in a step.

    Attributes:
        tokens: target tokens of a micro-batch on one rank.
        source_ratio: source tokens per target token.
        sentence_tokens: mean length of a sentence.
        micro_batches: of an update.
        precision: of payload and products.
        recompute: each layer's forward runs twice.
        load: relative loads of the experts; None: equal.
        skew: most loaded rank over the mean, beyond strategy and load.
        device: ``cuda`` or ``cpu``.
    """

    tokens: float
    source_ratio: float = 1.0
    sentence_tokens: float = 32.0
    micro_batches: int = 1
    precision: str = "bf16"
    recompute: bool = False
    load: Sequence[float] | None = None
    skew: float = 1.0
    device: str = "cuda"

    def tokens_of(self, stack: StackShape, shape: ModelShape) -> float:
        """Tokens of a stack in one micro-batch on one rank; each pass of a doubled batch counts."""
        return self.tokens * shape.passes * (self.source_ratio if stack.is_source else 1.0)

    @property
    def forwards(self) -> int:
        """Number of forward passes of a layer."""
        return 2 if self.recompute else 1


@dataclass(frozen=True)
class LinkTraffic:
    """Sums of one rank over a step, averaged over ranks; names as in :class:`moe_train.parallel.traffic.Traffic`."""

    dispatched_rows: float = 0.0
    returned_rows: float = 0.0
    payload_bytes: float = 0.0
    metadata_bytes: float = 0.0
    gradient_bytes: float = 0.0

    def __add__(self, other: LinkTraffic) -> LinkTraffic:
        return LinkTraffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class BlockTraffic:
    """One sparse block in one micro-batch on one rank."""

    tokens: float
    flows: tuple[Flow, ...]
    by_link: Mapping[LinkType, LinkTraffic]


@dataclass(frozen=True)
class StepTraffic:
    """A step of one rank, averaged over ranks.

    Attributes:
        blocks: the sparse blocks, of one micro-batch.
        by_link: all blocks and micro-batches, and the reduction of gradients.
    """

    blocks: tuple[BlockTraffic, ...]
    by_link: Mapping[LinkType, LinkTraffic] = field(default_factory=dict)

    @property
    def sent(self) -> LinkTraffic:
        """Traffic that leaves a rank."""
        return self.by_link["node"] + self.by_link["across"]


def step_traffic(shape: ModelShape, plan: LayoutPlan, work: Workload) -> StepTraffic:
    """Traffic of a step."""
    blocks = tuple(_blocks(shape, plan, work))
    total = {link: LinkTraffic() for link in LINKS}
    for block in blocks:
        for link in LINKS:
            total[link] += LinkTraffic(*(value * work.micro_batches for value in vars(block.by_link[link]).values()))
    for link, sent in gradient_bytes(shape, plan).items():
        total[link] += LinkTraffic(gradient_bytes=sent)
    return StepTraffic(blocks, total)


def _blocks(shape: ModelShape, plan: LayoutPlan, work: Workload) -> Iterator[BlockTraffic]:
    known: dict[int, tuple[Flow, ...]] = {}  # equal layers share their flows
    for stack in shape.stacks:
        for block in stack.sparse:
            key = id(block.routing)
            if key not in known:
                known[key] = block_flows(block, plan, work.load)
            yield block_traffic(block, known[key], work.tokens_of(stack, shape), work)


def block_flows(block: SparseShape, plan: LayoutPlan, load: Sequence[float] | None = None) -> tuple[Flow, ...]:
    """The steps of one block's exchange, forward and in one direction."""
    return expected_flows(plan, block.router.expected_choices(block.routing), block.num_experts, load)


def block_traffic(block: SparseShape, flows: tuple[Flow, ...], tokens: float, work: Workload) -> BlockTraffic:
    """Forward, recomputation and backward of one block and micro-batch."""
    row = block.spec.dim * BYTES[work.precision]
    total = {link: LinkTraffic() for link in LINKS}
    # One exchange, or one per stratum.
    exchanges = len({choice.stage for choice in block.router.expected_choices(block.routing)})
    for flow, counts in zip(flows, count_bytes(flows, block.num_experts), strict=True):
        for link in LINKS:
            rows, pairs = tokens * flow.rows[link], tokens * flow.pairs[link]
            total[link] += LinkTraffic(
                work.forwards * rows,
                work.forwards * rows,
                (work.forwards + 1) * 2 * rows * row,
                pairs * (work.forwards * PAIR + WEIGHT) + work.forwards * exchanges * counts * flow.peers[link],
            )
    return BlockTraffic(tokens, flows, total)


def count_bytes(flows: Sequence[Flow], num_experts: int) -> list[int]:
    """Bytes of sizes sent to each member, by step (:func:`moe_train.parallel.split_sizes.exchange_split_sizes`)."""
    members = [sum(flow.peers.values()) for flow in flows]
    each = [num_experts // math.prod(members[: n + 1]) for n in range(len(members))]
    ranks = [members[n + 1] if n + 1 < len(members) else 0 for n in range(len(members))]
    return [COUNT * (1 + behind + experts) for behind, experts in zip(ranks, each, strict=True)]


def gradient_bytes(shape: ModelShape, plan: LayoutPlan) -> dict[LinkType, float]:
    """Bytes that a rank sends to reduce gradients in fp32 by rings, averaged over ranks.

    A ring over n members sends 2 (n - 1) / n of the buffer over each of its n edges. Rings of dense
    parameters span the world, those of a rank's experts its replicas.
    """
    sent: dict[LinkType, float] = dict.fromkeys(LINKS, 0.0)
    experts = shape.expert_parameters / plan.expert_parallel
    for parameters, ring in ((shape.dense_parameters, range(plan.world)), (experts, plan.replicas_of(0))):
        volume = 2.0 * (len(ring) - 1) / len(ring) * parameters * 4
        crossing = ring_crossings(plan, tuple(ring)) / len(ring)
        sent["across"] += volume * crossing
        sent["node"] += volume * (1.0 - crossing)
    return sent


def ring_crossings(plan: LayoutPlan, ring: Sequence[int]) -> int:
    """Number of edges of a ring between two nodes."""
    return sum(plan.node(a) != plan.node(b) for a, b in zip(ring, (*ring[1:], ring[0]), strict=True))
