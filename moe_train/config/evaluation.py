"""Configs of moe-evaluate, moe-translate, moe-import, moe-export and moe-report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moe_train.config import check
from moe_train.config.check import NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed, Threads
from moe_train.config.run import DataVerify, LaunchConfig, SearchConfig
from moe_train.errors import ConfigError

Checkpoint = Annotated[str | int, Range(least=0)]  # a name, or an update's number


@dataclass(frozen=True)
class Inference:
    """Overrides of a trained model's routing.

    Attributes:
        routing: evaluation keys of the strategy.
        draw_seed: seed of strategies that draw experts at inference; None: the run's seed.
    """

    routing: Mapping[str, Any] = field(default_factory=dict)
    draw_seed: Seed | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "")


@dataclass(frozen=True)
class EvaluateConfig:
    """Translate a held-out split and score it.

    Attributes:
        run: the folder of a trained run.
        mode: ``translate`` and score with metrics, or ``score``: log-probabilities of references or hypotheses.
        hypotheses: with ``mode=score``, the folder of the translations to score, named as those of moe-evaluate (null:
            the references).
        split: ``test`` or ``valid``.
        checkpoint: ``best``, ``last``, ``averaged`` or an update's number.
        data: the data folder, if it has moved since training (null: the folder recorded in the run).
        data_verify: when its files are compared with their checksums, as in :class:`RunConfig`.
        directions: only these, e.g. ``[en-de]`` (empty: all trained directions with sentences in the split).
        max_sentences: only the first N sentences of each direction (0: all).
        tokenizer: sacrebleu's tokenizer for BLEU in every language: ``auto`` (by the script of the target language),
            ``flores200`` (spBLEU) …
        out: the folder for scores and outputs (null: the run folder).
        metrics: further metrics in addition to BLEU and chrF++: ``ter``, ``spbleu``, ``comet``, and those of plug-ins.
        metric: settings of further metrics by the metric's name, such as ``metric.comet.python``.
        examples: print this many sentences with reference and translation, drawn at random over the directions.
        seed: seed of the examples and of the baseline that shuffles outputs between sentences.
        expert_parallel: processes over which the experts of a layer are divided (1: every process holds all of them),
            independent of the layout of the training.
        routing, draw_seed: as in :class:`Inference`.
    """

    run: str
    split: Literal["test", "valid"] = "test"
    checkpoint: Checkpoint = "best"
    data: str | None = None
    data_verify: DataVerify = "once"
    directions: tuple[str, ...] = ()
    max_sentences: NonNegativeInt = 0
    tokenizer: Literal["auto", "13a", "intl", "char", "flores101", "flores200"] = "auto"
    out: str | None = None
    mode: Literal["translate", "score"] = "translate"
    hypotheses: str | None = None
    metrics: tuple[str, ...] = ()
    examples: NonNegativeInt = 0
    metric: Mapping[str, Any] = field(default_factory=dict)
    seed: Seed = 1
    expert_parallel: Annotated[int, Range(above=0, most=2**20)] = 1
    routing: Mapping[str, Any] = field(default_factory=dict)
    draw_seed: Seed | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check.numbers(self, "")
        if self.hypotheses is not None and self.mode != "score":
            raise ConfigError("hypotheses are read with mode=score only", "hypotheses", "set mode=score or omit it")
        if self.metrics and self.mode == "score":
            raise ConfigError("metrics need translations, which mode=score does not make", "metrics", "omit metrics=…")

    @property
    def inference(self) -> Inference:
        """How the model routes."""
        return Inference(self.routing, self.draw_seed)


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as one directory.

    Attributes:
        run, checkpoint, data, data_verify: as in :class:`EvaluateConfig`.
        out: the directory; it must not exist, or be empty.
        format: ``moe_train``, or ``huggingface`` for models that moe-import has made, trained or not.
        shard_mb: maximum size of a file of tensors, unless one tensor is larger.
        dense: THOR: write the dense model of one expert of each layer (``routing.inference=fixed``).
    """

    run: str
    out: str
    checkpoint: Checkpoint = "best"
    data: str | None = None
    data_verify: DataVerify = "once"
    format: Literal["moe_train", "huggingface"] = "moe_train"
    shard_mb: PositiveFloat = 5000.0
    dense: bool = False

    def __post_init__(self) -> None:
        check.numbers(self, "")


@dataclass(frozen=True)
class ImportConfig:
    """Read a model of Hugging Face transformers and write it as a model folder.

    Attributes:
        hf: the folder with ``config.json``, weights and tokenizer.
        out: the directory to write; it must not exist, or be empty.
        shard_mb: maximum size of a file of tensors, unless one tensor is larger; None: as large as the original's
            largest file. One file is in memory at a time.
    """

    hf: str
    out: str
    shard_mb: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check.numbers(self, "")


@dataclass(frozen=True)
class TranslateConfig:
    """Translate standard input, line by line.

    Attributes:
        run, checkpoint, data, data_verify: as in :class:`EvaluateConfig`.
        source, target: language codes, such as ``en`` and ``de``.
        buffer: maximum number of lines that are sorted by length and translated together, if input arrives fast enough.
        long_lines: for lines longer than the model's longest source: ``cut`` translates the beginning, ``split``
            translates parts split at sentence ends. Both print a warning per line.
        output: ``text``: ``search.n_best`` lines for each line; ``tsv``: line number, rank, score and text of each
            hypothesis; ``json``: an object for each line.
        token_scores: ``output=json`` has the log-probability of each token.
        prefixes: a line is a sentence, a tab, and a target prefix, with which its translation begins.
        threads: CPU threads (0: all cores).
        routing, draw_seed: as in :class:`Inference`.
    """

    run: str
    source: str
    target: str
    checkpoint: Checkpoint = "best"
    data: str | None = None
    data_verify: DataVerify = "once"
    buffer: PositiveInt = 512
    long_lines: Literal["cut", "split"] = "cut"
    output: Literal["text", "tsv", "json"] = "text"
    token_scores: bool = False
    prefixes: bool = False
    threads: Threads = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    routing: Mapping[str, Any] = field(default_factory=dict)
    draw_seed: Seed | None = None
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        check.numbers(self, "")
        if self.token_scores and self.output != "json":
            raise ConfigError("token_scores=true needs output=json", remedy="set output=json")

    @property
    def inference(self) -> Inference:
        """How the model routes."""
        return Inference(self.routing, self.draw_seed)


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs.

    Attributes:
        runs: run folders, or folders of runs such as a multirun's.
        baseline: the run that others are tested against, by folder name or path (null: the first with scores).
        out: the folder for ``leaderboard.csv`` and ``leaderboard.md`` (null: the folder that contains the runs).
        split: the split whose scores are shown.
        part: part of the split, as named in moe-evaluate's files, such as ``first-50`` ("": the whole split).
        samples: samples of the paired bootstrap (0: no significance test).
        significance: p values below this are marked.
        html: write ``report.html`` next to the leaderboard.
        sentences: held-out sentences on which the page's routing atlas probes a run (0: no atlas).
    """

    runs: tuple[str, ...]
    baseline: str | None = None
    out: str | None = None
    split: Literal["test", "valid"] = "test"
    part: str = ""
    samples: NonNegativeInt = 1000
    significance: Annotated[float, Range(above=0, most=1)] = 0.05
    html: bool = True
    sentences: NonNegativeInt = 96

    def __post_init__(self) -> None:
        check.numbers(self, "")
