"""The whole of a training run, and the small groups that need no file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, RankReduction, Seed
from moe_train.config.engine import EngineConfig
from moe_train.config.model import ModelConfig
from moe_train.config.training import TrainingConfig
from moe_train.errors import ConfigError
from moe_train.plugins import import_plugin

# When data files are compared with their checksums: at every start; where they have changed since; not at all.
DataVerify = Literal["always", "once", "never"]

_TASKS: dict[str, type[TaskConfig]] = {}


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt from the data: translation, unless a subclass of :mod:`moe_train.config.tasks` is named.

    Attributes:
        name: ``translation``, or what a subclass is registered as.
        directions: train on these only, e.g. ``[en-de, de-en]`` (empty: all that the data folder names).
        source_tag, target_tag: which language tag starts the source and the decoder's input: ``source``, ``target`` or
            ``none`` (NLLB: ``source`` and ``target``; SMoE's scripts: ``target`` and ``target``).
    """

    name: str = "translation"
    directions: tuple[str, ...] = ()
    source_tag: Literal["source", "target", "none"] = "target"
    target_tag: Literal["source", "target", "none"] = "none"

    def __post_init__(self) -> None:
        if "target" not in (self.source_tag, self.target_tag) and len(self.directions) != 1:
            raise ConfigError(
                "with several directions the model must be told the target language",
                remedy="set task.source_tag=target or task.target_tag=target",
            )

    def __init_subclass__(cls, **unused: Any) -> None:
        """Registers the subclass under its default name."""
        _TASKS[str(cls.name)] = cls

    @classmethod
    def variant(cls, mapping: Mapping[str, Any]) -> type[TaskConfig]:
        """The class that has the keys of the task named in ``mapping``."""
        name = str(mapping.get("name", cls.name))
        if name not in (*_TASKS, cls.name):
            import_plugin("tasks", name)  # which may have keys of its own
        return _TASKS.get(name, cls)

    @property
    def subject(self) -> str:
        """What of the data is used, for the summary of a run."""
        return ", ".join(self.directions) or "all directions"

    @property
    def unit(self) -> str:
        """What ``training.tokens_per_update`` counts."""
        return "target tokens"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What may choose the best checkpoint."""
        return ("loss", "bleu")

    @property
    def translates(self) -> bool:
        """Whether its models write text, so that BLEU can be asked for."""
        return type(self) is TaskConfig


@dataclass(frozen=True)
class LayoutConfig:
    """Which rank holds which experts. world = replicas x expert_parallel.

    Attributes:
        name: ``data_parallel`` (all experts on every rank, unless ``expert_parallel`` says otherwise),
            ``expert_parallel``, ``node`` (expert groups stay inside a node, replicas stand across nodes) or
            ``two_level`` (groups span nodes, tokens travel node by node and then rank by rank).
        expert_parallel: ranks over which the experts of a layer are divided; 0: as many as can be, of one node's for
            ``node``, of the world's otherwise.
        ranks_per_node: ranks of a node; 0: as many as were started on each host.
        two_level: exchange between nodes first and inside the node then, where a group spans nodes.
        overlap: a shared expert is computed while rows travel.
        fixed_rows: in training every rank sends so many rows to each other one, in every exchange, and no size has to
            reach the host; tokens beyond it lose their experts there. 0: as many as there are.
    """

    name: Literal["data_parallel", "expert_parallel", "node", "two_level"] = "data_parallel"
    expert_parallel: RankReduction = 1
    ranks_per_node: RankReduction = 0
    two_level: bool = False
    overlap: bool = False
    fixed_rows: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check.numbers(self, "layout")
        if self.fixed_rows and self.two_level:
            raise ConfigError(
                "layout.fixed_rows fixes the sizes of an exchange in one step, and layout.two_level takes two",
                remedy="set layout.fixed_rows=0 or layout.two_level=false",
            )


@dataclass(frozen=True)
class LaunchConfig:
    """How processes come to life.

    Attributes:
        processes: processes to start on this host (1: run in this one; ignored under torchrun, which has started them).
        port: no longer used (processes of one host meet in a folder); read because earlier runs name it.
        timeout_minutes: a collective that waits longer than this ends the job.
        silent_minutes: one that waits for a rank of which nothing is heard for so long ends it, too (0: it does not).
        device: ``auto`` takes a GPU per process where there is one.
    """

    processes: Annotated[int, Range(above=0, most=4096)] = 1
    port: Annotated[int, Range(least=0, most=65535)] = 0
    timeout_minutes: Annotated[float, Range(least=0.001, most=1e6)] = 30.0
    silent_minutes: Annotated[float, Range(least=0, most=1e6)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check.numbers(self, "launch")


@dataclass(frozen=True)
class SearchConfig:
    """Beam search.

    Attributes:
        beam: hypotheses that are kept of each sentence.
        length_penalty: exponent of the length that a hypothesis' score is divided by.
        max_length_ratio, max_length_offset: a hypothesis has at most ratio · source length + offset tokens
            (fairseq-generate: 0 and 200), or one.
        min_length: a hypothesis has at least so many tokens, the end not counted.
        unk_penalty: taken from the log-probability of the unknown word; below 0 favours it.
        batch_tokens: source tokens of a batch.
    """

    beam: Annotated[int, Range(above=0, most=10_000)] = 5
    length_penalty: Annotated[float, Range(least=-10, most=10)] = 1.0
    max_length_ratio: NonNegativeFloat = 2.0
    max_length_offset: Annotated[int, Range(least=-(2**31), most=2**31 - 1)] = 10
    min_length: NonNegativeInt = 1
    unk_penalty: Annotated[float, Range(least=-1e6, most=1e6)] = 0.0
    batch_tokens: PositiveInt = 4096

    def __post_init__(self) -> None:
        check.numbers(self, "search")
        if self.max_length_ratio == 0 and self.max_length_offset < max(1, self.min_length):
            raise ConfigError(
                f"search.max_length_ratio=0 and search.max_length_offset={self.max_length_offset} leave less than"
                f" {max(1, self.min_length)} tokens to a hypothesis",
                remedy="raise search.max_length_offset (fairseq-generate has 200)",
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that ``moe-train`` reads. ``routing`` stays a mapping here: its dataclass belongs to the strategy."""

    data: str
    seed: Seed = 1
    routing: Mapping[str, Any] = field(default_factory=lambda: {"name": "dense"})
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    resume: Literal["auto", "never", "must", "missing"] = "auto"
    evaluate: Literal["test", "valid"] | None = None
    data_verify: DataVerify = "once"

    def __post_init__(self) -> None:
        check.numbers(self, "")
        metric, known = self.training.validation.metric, self.task.metrics
        if metric not in known:
            raise ConfigError(
                f"training.validation.metric={metric} is not measured by task={self.task.name}",
                remedy=f"choose {' or '.join(known)}",
            )
        if self.training.validation.bleu and not self.task.translates:
            raise ConfigError(
                f"task={self.task.name} has no BLEU", remedy="leave out training.validation.bleu and its metric"
            )
