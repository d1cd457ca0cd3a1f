"""Config of ``moe-plan``: model, strategy, layout and a (hypothetical) cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from moe_train.config.engine import EngineConfig
from moe_train.config.model import ModelConfig
from moe_train.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
PositiveRanks = Annotated[int, Range(above=0, most=2**20)]


@dataclass(frozen=True)
class ClusterConfig:
    """Machines of the cost model. GB and TFLOP/s are powers of ten, also for memory.

    Attributes:
        name: name shown in the table.
        ranks_per_node: processes (GPUs) per node.
        tflops: peak TFLOP/s of one rank's matrix products in the training precision.
        efficiency: fraction of that peak that a Transformer reaches, including all other operations.
        memory_gb: memory of one rank.
        memory_bandwidth: GB/s of one rank's memory, for the optimizer's step.
        bandwidth_node: GB/s that one rank sends to others of its node.
        bandwidth_across: GB/s that one *node* sends to other nodes, shared by its ranks.
        latency_node, latency_across: microseconds until a collective's first byte arrives.
        message: microseconds that each further member of a group adds to an all-to-all.
        layer_overhead: microseconds per sparse layer and direction for counting and kernel launches.
        device: device of the ranks; on CPUs attention with dropout stores all its scores.
    """

    name: str
    ranks_per_node: PositiveRanks
    tflops: PositiveFloat
    efficiency: Annotated[float, Range(above=0, most=1)]
    memory_gb: PositiveFloat
    memory_bandwidth: PositiveFloat
    bandwidth_node: PositiveFloat
    bandwidth_across: PositiveFloat
    latency_node: NonNegativeFloat = 10.0
    latency_across: NonNegativeFloat = 20.0
    message: NonNegativeFloat = 1.0
    layer_overhead: NonNegativeFloat = 100.0
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        check.numbers(self, "cluster")


@dataclass(frozen=True)
class PlanLayout:
    """Layout keys; ``auto`` selects the fastest layout that fits in memory. ``ranks_per_node`` null: the cluster's."""

    world: PositiveRanks = 8
    expert_parallel: PositiveRanks | Literal["auto"] = "auto"
    two_level: bool | Literal["auto"] = "auto"
    ranks_per_node: PositiveRanks | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "layout")


@dataclass(frozen=True)
class PlanTraining:
    """Training keys as in ``moe-train``.

    Attributes:
        tokens_per_update: target tokens per update over all ranks; None: 4,096 per rank and micro-batch.
        accumulation: micro-batches per update.
        overlap: whether gradients are reduced during backward (as DDP does).
    """

    tokens_per_update: Annotated[int | None, Range(above=0, most=2**40)] = None
    accumulation: PositiveInt = 1
    precision: Precision = "bf16"
    recompute: bool = False
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    overlap: bool = True

    def __post_init__(self) -> None:
        check.numbers(self, "training")


@dataclass(frozen=True)
class PlanBatch:
    """Properties of the batches.

    Attributes:
        sentence_tokens: mean length of a sentence in tokens, including padding.
        source_ratio: source tokens per target token.
        load: relative loads of the experts, as in a run's log; None: equal.
        skew: additional ratio of the most loaded rank's rows to the mean, beyond strategy and load (1: none).
    """

    sentence_tokens: PositiveFloat = 32.0
    source_ratio: PositiveFloat = 1.0
    load: Annotated[tuple[float, ...] | None, Range(least=0, most=1e12)] = None
    skew: Annotated[float, Range(least=1, most=1e12)] = 1.0

    def __post_init__(self) -> None:
        check.numbers(self, "batch")
        if self.load is not None and not sum(self.load):
            raise ConfigError("'batch.load' must be numbers of 0 or more, not all 0", remedy="give one per expert")


@dataclass(frozen=True)
class PlanImages:
    """Images of ``size`` x ``size`` pixels."""

    size: Annotated[int, Range(above=0, most=2**14)] = 224
    channels: Annotated[int, Range(above=0, most=1024)] = 3

    def __post_init__(self) -> None:
        check.numbers(self, "images")


@dataclass(frozen=True)
class PlanConfig:
    """The whole config of ``moe-plan``. ``routing`` is a mapping, since its dataclass depends on the strategy.

    Attributes:
        images: for ``model=vit_…``, whose tokens are patches.
        vocabulary: size of the joint dictionary; number of classes for images.
        alternatives: number of layouts in the table.
        json: also write the results to this file; ``-`` prints JSON instead of the tables.
    """

    cluster: ClusterConfig
    routing: Mapping[str, Any] = field(default_factory=lambda: {"name": "dense"})
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: PlanLayout = field(default_factory=PlanLayout)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: PlanTraining = field(default_factory=PlanTraining)
    batch: PlanBatch = field(default_factory=PlanBatch)
    images: PlanImages = field(default_factory=PlanImages)
    vocabulary: Annotated[int, Range(least=2, most=2**24)] = 32000
    alternatives: PositiveInt = 6
    json: str | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "")

    @property
    def ranks_per_node(self) -> int:
        """``layout.ranks_per_node``, or the cluster's."""
        return self.layout.ranks_per_node or self.cluster.ranks_per_node

    @property
    def tokens_per_rank(self) -> float:
        """Target tokens per rank and micro-batch."""
        if self.training.tokens_per_update is None:
            return 4096.0
        return self.training.tokens_per_update / self.training.accumulation / self.layout.world
