"""Config of the training: batches, optimizer, schedule, precision, checkpoints, validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from moe_train.config import check
from moe_train.config.check import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
    SamplingTemperature,
    Threads,
)
from moe_train.errors import ConfigError

Decay = Literal["matrices", "all"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam by default; ``sgd`` is for parity checks.

    Attributes:
        name: ``adamw`` has decoupled weight decay (Loshchilov & Hutter 2019), as fairseq's ``--optimizer adam``;
            ``adam`` and ``sgd`` add ``weight_decay`` times a parameter to its gradient (L2).
        weight_decay: coefficient of weight decay.
        decay: parameters with weight decay: ``matrices``, or ``all`` including biases and norms, as in fairseq. A
            parameter's attribute ``decays`` has priority
            (:func:`moe_train.training.optim.optimizer.parameter_groups`).
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Range(above=0, most=1e4)] = 5e-4
    betas: Annotated[tuple[float, ...], Range(least=0, below=1)] = (0.9, 0.98)
    eps: Annotated[float, Range(least=1e-30, most=1)] = 1e-8
    weight_decay: Annotated[float, Range(least=0, most=1e4)] = 0.0
    decay: Decay = "matrices"
    momentum: Probability = 0.0

    def __post_init__(self) -> None:
        check.numbers(self, "training.optimizer")
        if len(self.betas) != 2:
            raise ConfigError(
                f"'training.optimizer.betas' has {len(self.betas)} numbers, and Adam takes two",
                remedy="write training.optimizer.betas=[0.9,0.98]",
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over updates: linear warm-up to ``optimizer.lr``, then the named decay.

    Attributes:
        end_lr: final rate of ``linear``, ``cosine`` and ``polynomial``, reached at ``training.max_updates``.
        power: exponent of ``polynomial``.
        extend: the rate of a finished run that is resumed with more updates: ``hold`` keeps its last rate, ``restart``
            gives the further updates their own warm-up and decay. None: the schedule is recomputed for all updates, so
            that the rate jumps.
    """

    name: Literal["inverse_sqrt", "linear", "cosine", "polynomial", "constant"] = "inverse_sqrt"
    warmup_updates: NonNegativeInt = 4000
    warmup_init_lr: Annotated[float, Range(least=0, most=1e4)] = 1e-7
    end_lr: Annotated[float, Range(least=0, most=1e4)] = 0.0
    power: Annotated[float, Range(least=0, most=1000)] = 1.0
    extend: Literal["restart", "hold"] | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "training.schedule")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. ``last`` and ``best`` are always kept.

    ``average``: number of last checkpoints whose mean is written as ``averaged`` at the end (0: none).
    ``damaged``: if the newest checkpoint is damaged, a run stops (``refuse``) or uses the one before (``skip``).
    """

    every_updates: PositiveInt = 1000
    keep: PositiveInt = 3
    average: NonNegativeInt = 0
    asynchronous: bool = False
    damaged: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        check.numbers(self, "training.checkpoint")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation interval, metric of ``best``, early stopping after ``patience`` validations without improvement."""

    every_updates: PositiveInt = 500
    metric: Literal["loss", "bleu", "accuracy", "macro_f1"] = "loss"
    patience: NonNegativeInt = 0
    max_sentences: NonNegativeInt = 0
    bleu: bool = False

    def __post_init__(self) -> None:
        check.numbers(self, "training.validation")
        if self.metric == "bleu" and not self.bleu:
            raise ConfigError(
                "training.validation.metric=bleu needs BLEU to be computed", remedy="set training.validation.bleu=true"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Config of the training loop.

    Attributes:
        max_updates: total number of optimizer updates.
        tokens_per_update: target tokens (including padding) of one update, over all ranks.
        accumulation: micro-batches per update; each micro-batch is divided over all ranks.
        max_sentence_tokens: longer training sentences are skipped and counted; with ``task.pack``, a block's length.
        clip_norm: gradients are clipped to this norm (0: no clipping).
        precision: ``fp32``, ``bf16`` or ``fp16`` (with loss scaling); routers stay in fp32.
        recompute: recompute each layer's activations in the backward pass to save memory.
        packed: compute text models on the tokens of a batch without padding. ``auto``: where it can be done, on GPUs
            in bf16 or fp16 without ``model.attention_dropout``; true: refuse to train where it cannot.
        temperature: directions are sampled in proportion to size^(1/temperature).
        shuffle_window: a translation corpus of more sentences is planned in random windows of this many.
        compile: ``router``: ``torch.compile`` of routers and row plans.
        nonfinite_limit: this many consecutive updates with a non-finite gradient end the run (0 and 1: the first one).
        threads: CPU threads per process (0: OMP_NUM_THREADS, else cores divided by the processes on this host).
        loggers: loggers in addition to JSON lines and TensorBoard: ``wandb``, ``mlflow``, and those of plug-ins.
    """

    max_updates: PositiveInt = 10000
    tokens_per_update: Annotated[int, Range(above=0, most=2**40)] = 8192
    accumulation: PositiveInt = 1
    max_sentence_tokens: PositiveInt = 256
    temperature: SamplingTemperature = 1.0
    shuffle_window: PositiveInt = 2**20
    label_smoothing: Probability = 0.1
    clip_norm: NonNegativeFloat = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    compile: Literal["none", "router"] = "none"
    packed: Literal["auto", True, False] = False
    nonfinite_limit: NonNegativeInt = 20
    log_every: PositiveInt = 50
    threads: Threads = 0
    init_from: str | None = None
    loggers: tuple[str, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        check.numbers(self, "training")

    @property
    def micro_batch_tokens(self) -> int:
        """Maximum tokens of a micro-batch, over all ranks."""
        return max(1, self.tokens_per_update // self.accumulation)
