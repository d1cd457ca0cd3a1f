"""How a model is trained: batches, optimizer, schedule, precision, checkpoints, when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_train.config import check
from moe_train.errors import ConfigError

Decay = Literal["matrices", "all"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam by default; ``sgd`` is there for parity checks.

    Attributes:
        name: ``adamw`` decays parameters beside the gradient's step (decoupled, Loshchilov & Hutter 2019), as fairseq's
            ``--optimizer adam`` does; ``adam`` and ``sgd`` add ``weight_decay`` times a parameter to its gradient (L2).
        weight_decay: its coefficient.
        decay: which parameters decay: ``matrices``, or ``all`` as with fairseq, biases and norms too. A parameter with
            the attribute ``decays`` (:func:`moe_train.training.optimizer.parameter_groups`) keeps to that.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 5e-4
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Decay = "matrices"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check.positive("training.optimizer.lr", self.lr)
        check.not_negative("training.optimizer.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over updates: linear warm-up to ``optimizer.lr``, then the named decay.

    Attributes:
        end_lr: the floor of ``linear``, ``cosine`` and ``polynomial``, which end at ``training.max_updates``.
        power: of ``polynomial``.
        extend: the rate of a run that has ended and is given more updates: ``hold`` keeps the one that it ended with,
            ``restart`` gives the further updates a warm-up and decay of their own. None: the schedule is laid out anew
            for all updates, so that the rate jumps.
    """

    name: Literal["inverse_sqrt", "linear", "cosine", "polynomial", "constant"] = "inverse_sqrt"
    warmup_updates: int = 4000
    warmup_init_lr: float = 1e-7
    end_lr: float = 0.0
    power: float = 1.0
    extend: Literal["restart", "hold"] | None = None

    def __post_init__(self) -> None:
        check.not_negative("training.schedule.warmup_updates", self.warmup_updates)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. ``last`` and ``best`` are always kept.

    ``average`` = number of last checkpoints whose mean is written as ``averaged`` at the end (0: none).
    ``damaged``: where the newest one is damaged a run refuses to go on (``refuse``) or takes the one before (``skip``).
    """

    every_updates: int = 1000
    keep: int = 3
    average: int = 0
    asynchronous: bool = False
    damaged: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        check.positive("training.checkpoint.every_updates", self.every_updates)
        check.positive("training.checkpoint.keep", self.keep)
        check.not_negative("training.checkpoint.average", self.average)


@dataclass(frozen=True)
class ValidationConfig:
    """How often to validate, what chooses ``best``, when to stop (after ``patience`` validations without gain)."""

    every_updates: int = 500
    metric: Literal["loss", "bleu", "accuracy", "macro_f1"] = "loss"
    patience: int = 0
    max_sentences: int = 0
    bleu: bool = False

    def __post_init__(self) -> None:
        check.positive("training.validation.every_updates", self.every_updates)
        check.not_negative("training.validation.patience", self.patience)
        if self.metric == "bleu" and not self.bleu:
            raise ConfigError(
                "training.validation.metric=bleu needs BLEU to be computed", remedy="set training.validation.bleu=true"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Attributes:
        max_updates: optimizer steps in all.
        tokens_per_update: target tokens (padding included) of one update, over all ranks.
        accumulation: micro-batches that an update is cut into; each micro-batch is shared by all ranks.
        max_sentence_tokens: longer training sentences are left out and counted; with ``task.pack``, a block's length.
        clip_norm: gradients are scaled down to this norm (0: never).
        precision: ``fp32``, ``bf16`` or ``fp16`` (with loss scaling); routers stay in fp32.
        recompute: recompute each layer's activations in the backward pass to save memory.
        temperature: directions are sampled in proportion to size^(1/temperature).
        nonfinite_limit: this many updates in a row without a finite gradient end the run.
        threads: CPU threads per process (0: OMP_NUM_THREADS, else cores divided by the processes on this host).
        loggers: who is told of log lines besides JSON lines and TensorBoard, by the names that code from outside has
            registered.
    """

    max_updates: int = 10000
    tokens_per_update: int = 8192
    accumulation: int = 1
    max_sentence_tokens: int = 256
    temperature: float = 1.0
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    nonfinite_limit: int = 20
    log_every: int = 50
    threads: int = 0
    init_from: str | None = None
    loggers: tuple[str, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        for key in ("max_updates", "tokens_per_update", "accumulation", "max_sentence_tokens", "temperature"):
            check.positive(f"training.{key}", getattr(self, key))
        for key in ("clip_norm", "threads"):
            check.not_negative(f"training.{key}", getattr(self, key))
        check.positive("training.log_every", self.log_every)
        check.probability("training.label_smoothing", self.label_smoothing)

    @property
    def micro_batch_tokens(self) -> int:
        """What a micro-batch may hold, over all ranks."""
        return max(1, self.tokens_per_update // self.accumulation)
