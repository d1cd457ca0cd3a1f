"""Config of ``moe-train``, with the groups task, layout, launch and search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, RankCount, Seed
from moe_train.config.engine import EngineConfig
from moe_train.config.model import ModelConfig
from moe_train.config.training import TrainingConfig
from moe_train.errors import ConfigError
from moe_train.plugins import import_plugin

# When data files are compared with their checksums: at every start; if they have changed since; not at all.
DataVerify = Literal["always", "once", "never"]

_TASKS: dict[str, type[TaskConfig]] = {}


@dataclass(frozen=True)
class TaskConfig:
    """The task: translation; subclasses in :mod:`moe_train.config.tasks` are other tasks.

    Attributes:
        name: ``translation``, or the name of a subclass.
        directions: train on these only, e.g. ``[en-de, de-en]`` (empty: all directions of the data folder).
        source_tag, target_tag: language tag at the start of the source and of the decoder's input: ``source``,
            ``target`` or ``none`` (NLLB: ``source`` and ``target``; SMoE's scripts: ``target`` and ``target``).
        source_tag_place: ``start``, before the sentence, or ``end``, after its end symbol.
        target_tag_place: ``start``, in place of the end symbol that the decoder reads first, or ``after_end``, as the
            next symbol (M2M-100, NLLB); then the tag is a target token too.
    """

    name: str = "translation"
    directions: tuple[str, ...] = ()
    source_tag: Literal["source", "target", "none"] = "target"
    target_tag: Literal["source", "target", "none"] = "none"
    source_tag_place: Literal["start", "end"] = "start"
    target_tag_place: Literal["start", "after_end"] = "start"

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
        """The config class of the task named in ``mapping``."""
        name = str(mapping.get("name", cls.name))
        if name not in (*_TASKS, cls.name):
            import_plugin("tasks", name)  # the plug-in may register its config class
        return _TASKS.get(name, cls)

    @property
    def subject(self) -> str:
        """The part of the data that is used, for the summary of a run."""
        return ", ".join(self.directions) or "all directions"

    @property
    def unit(self) -> str:
        """Unit of ``training.tokens_per_update``."""
        return "target tokens"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that can select the best checkpoint."""
        return ("loss", "bleu")

    @property
    def translates(self) -> bool:
        """Whether its models generate text, so that BLEU can be computed."""
        return type(self) is TaskConfig


@dataclass(frozen=True)
class LayoutConfig:
    """Which rank holds which experts. world = replicas x expert_parallel.

    Attributes:
        name: ``data_parallel`` (all experts on every rank, unless ``expert_parallel`` is set), ``expert_parallel``,
            ``node`` (expert groups inside a node, replicas across nodes) or ``two_level`` (groups span nodes, tokens
            are sent between nodes first, then between the ranks of a node).
        expert_parallel: ranks over which the experts of a layer are divided; 0: as many as possible, of a node for
            ``node``, of the world otherwise.
        ranks_per_node: ranks per node; 0: as many as were started on each host.
        two_level: dispatch between nodes first, then inside the node, if a group spans nodes.
        overlap: compute a shared expert while rows are being sent.
        fixed_rows: in training every rank sends exactly this many rows to each member in every dispatch, so that the
            host reads no size; pairs beyond it are dropped. 0: variable sizes.
    """

    name: Literal["data_parallel", "expert_parallel", "node", "two_level"] = "data_parallel"
    expert_parallel: RankCount = 1
    ranks_per_node: RankCount = 0
    two_level: bool = False
    overlap: bool = False
    fixed_rows: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check.numbers(self, "layout")
        if self.fixed_rows and self.two_level:
            raise ConfigError(
                "layout.fixed_rows works with one dispatch level only, and layout.two_level has two",
                remedy="set layout.fixed_rows=0 or layout.two_level=false",
            )


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started.

    Attributes:
        processes: processes to start on this host (1: run in this process; ignored under torchrun).
        port: no longer used (processes of one host rendezvous in a folder); kept because earlier runs recorded it.
        timeout_minutes: a collective that waits longer than this ends the job.
        silent_minutes: a collective that waits for a rank without any sign of life for this long ends the job, too
            (0: off).
        device: ``auto``: one GPU per process if there are enough, else the CPU.
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
    """Beam search, or sampling.

    Attributes:
        beam: hypotheses per sentence.
        length_penalty: scores are divided by length^length_penalty.
        max_length_ratio, max_length_offset: a hypothesis has at most ratio · source length + offset tokens
            (fairseq-generate: 0 and 200), and at least one is allowed.
        min_length: minimum tokens of a hypothesis, without the end.
        unk_penalty: subtracted from the log-probability of the unknown word; values below 0 favour it.
        batch_tokens: source tokens per batch.
        n_best: translations of each sentence where they are written, at most ``beam``.
        no_repeat_ngram: n-grams of this many tokens occur once in a hypothesis (0: no limit).
        sampling: draws ``beam`` hypotheses instead of searching for the best.
        temperature: logits are divided by it, in a beam search too.
        top_k: with sampling, draws among the k most probable symbols (0: all).
        top_p: with sampling, draws among the fewest symbols that have this probability together (1: all).
        seed: of the draws.
        weights: type of the weights while searching. ``bf16`` and ``int8`` are for CPUs with matrix units; the encoder
            then computes in bf16. Routers, norms and sums stay fp32.
    """

    beam: Annotated[int, Range(above=0, most=10_000)] = 5
    length_penalty: Annotated[float, Range(least=-10, most=10)] = 1.0
    max_length_ratio: NonNegativeFloat = 2.0
    max_length_offset: Annotated[int, Range(least=-(2**31), most=2**31 - 1)] = 10
    min_length: NonNegativeInt = 1
    unk_penalty: Annotated[float, Range(least=-1e6, most=1e6)] = 0.0
    batch_tokens: PositiveInt = 4096
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    n_best: PositiveInt = 1
    no_repeat_ngram: Annotated[int, Range(least=0, most=10_000)] = 0
    sampling: bool = False
    temperature: Annotated[float, Range(above=0, most=1e6)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    seed: Seed = 1

    def __post_init__(self) -> None:
        check.numbers(self, "search")
        if self.n_best > self.beam:
            raise ConfigError(
                f"search.n_best={self.n_best} is more than search.beam={self.beam}",
                remedy=f"set search.beam={self.n_best}",
            )
        if (self.top_k or self.top_p < 1) and not self.sampling:
            raise ConfigError(
                "search.top_k and search.top_p are for sampling, and search.sampling is false",
                remedy="set search.sampling=true",
            )
        if self.top_k and self.top_p < 1:
            raise ConfigError("search.top_k and search.top_p are both set", remedy="choose one of them")
        if self.max_length_ratio == 0 and self.max_length_offset < max(1, self.min_length):
            raise ConfigError(
                f"search.max_length_ratio=0 and search.max_length_offset={self.max_length_offset} leave less than"
                f" {max(1, self.min_length)} tokens to a hypothesis",
                remedy="raise search.max_length_offset (fairseq-generate has 200)",
            )


@dataclass(frozen=True)
class RunConfig:
    """The whole config of ``moe-train``. ``routing`` is a mapping, since its dataclass depends on the strategy.

    ``kernels``: Triton kernels of sparse layers (:mod:`moe_train.kernels.device_kernels`).
    """

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
    kernels: Literal["auto", "torch", "triton"] = "auto"

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
