"""Registry of metrics that ``moe-evaluate metrics=[…]`` computes in addition to BLEU and chrF++."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from moe_train.errors import ConfigError, located
from moe_train.plugins import load_plugin, offer_names


@dataclass(frozen=True)
class Corpus:
    """One direction's sentences, aligned line by line and detokenised."""

    direction: str
    sources: Sequence[str]
    hypotheses: Sequence[str]
    references: Sequence[str]

    @property
    def target(self) -> str:
        """The target language's code."""
        return self.direction.split("-")[1]


@dataclass(frozen=True)
class MetricScore:
    """The score of a corpus, and a text that says how it was computed: version, tokenizer, model ("": unknown)."""

    score: float
    signature: str = ""


class CorpusMetric:
    """A metric that reads sources, has settings or a signature; registered by :func:`register_corpus_metric`.

    Args:
        settings: those of ``metric.NAME``. The constructor checks them and what the metric needs, before anything is
            translated.

    Attributes:
        together: whether :meth:`score` gets all directions in one call, such as for a model that is loaded once.

    Raises:
        UserError: a setting is wrong, or something that the metric needs is missing.
    """

    together = False

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings:
            raise ConfigError(f"it has no setting '{next(iter(settings))}'", remedy="omit it")

    def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
        """The score of each corpus. An error is a note in the results, and the scores of the corpora are left out."""
        raise NotImplementedError


#: Hypotheses, references (aligned sentence by sentence, detokenised), target language -> score of the corpus.
Metric = Callable[[Sequence[str], Sequence[str], str], float]
M = TypeVar("M", bound=Metric)
C = TypeVar("C", bound=Callable[[Mapping[str, Any]], CorpusMetric])
ALWAYS = ("bleu", "chrf")  # always computed (moe_train.evaluation.scoring.bleu_chrf)
# name -> module in this folder and class; imported when asked for, since COMET and sacrebleu's models are seldom used.
BUILT_IN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ter": ("ter_spbleu", "TranslationEditRate"),
        "spbleu": ("ter_spbleu", "SpBleu"),
        "comet": ("comet", "Comet"),
    }
)
# Keys of test.json next to the scores, which cannot be names of metrics.
TAKEN = (*ALWAYS, "copy", "shuffled", "sentences", "words", "reference_words", "tokenizer", "zero_shot", "directions")

_METRICS: dict[str, Callable[[Mapping[str, Any]], CorpusMetric]] = {}


def register_metric(name: str) -> Callable[[M], M]:
    """Decorator that registers a function for ``metrics=[name]``; its scores have the key ``name`` in ``test.json``.

    Raises:
        ValueError: the name is in use.
    """

    def add(metric: M) -> M:
        class OfFunction(CorpusMetric):
            def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
                return [MetricScore(metric(c.hypotheses, c.references, c.target)) for c in corpora]

        register_corpus_metric(name)(OfFunction)
        return metric

    return add


def register_corpus_metric(name: str) -> Callable[[C], C]:
    """As :func:`register_metric`, for a subclass of :class:`CorpusMetric`.

    Raises:
        ValueError: the name is in use.
    """

    def add(make: C) -> C:
        if name in _METRICS or name in TAKEN or name in BUILT_IN:
            raise ValueError(f"the name of the metric {name!r} is in use")
        _METRICS[name] = make
        return make

    return add


def find_metrics(names: Iterable[str], settings: Mapping[str, Any] = MappingProxyType({})) -> dict[str, CorpusMetric]:
    """The metrics with these names, in their order, without those that are always computed.

    Args:
        settings: name of a metric -> its settings.

    Raises:
        ConfigError: a name is unknown, its plug-in is broken, or its settings are wrong.
        UserError: something that a metric needs is missing.
    """
    chosen = [name for name in dict.fromkeys(names) if name not in ALWAYS]
    for name, own in settings.items():
        if name not in chosen:
            raise ConfigError(f"metrics=[…] does not have '{name}'", f"metric.{name}", "add it there, or omit its keys")
        if not isinstance(own, Mapping):
            raise ConfigError("this must be a group of keys", f"metric.{name}", f"write metric.{name}.KEY=…")
    makers = {name: _maker(name) for name in chosen}
    found = {}
    for name, make in makers.items():
        with located(f"metric.{name}"):
            found[name] = make(settings.get(name, {}))
    return found


def _maker(name: str) -> Callable[[Mapping[str, Any]], CorpusMetric]:
    if name in BUILT_IN:
        module, member = BUILT_IN[name]
        built_in: type[CorpusMetric] = getattr(importlib.import_module(f"{__package__}.{module}"), member)
        return built_in
    load_plugin("metrics", name, _METRICS)
    if name not in _METRICS:
        remedy = offer_names("metrics", name, [*_METRICS, *BUILT_IN, *ALWAYS])
        raise ConfigError(f"there is no metric '{name}'", "metrics", remedy)
    return _METRICS[name]


def measure(name: str, metric: CorpusMetric, corpora: Sequence[Corpus]) -> tuple[dict[str, MetricScore], list[str]]:
    """Scores by direction, and notes about directions without a score: the metric failed or its score is not finite."""
    scores: dict[str, MetricScore] = {}
    failed = []
    for part in [corpora] if metric.together else [[corpus] for corpus in corpora]:
        directions = [corpus.direction for corpus in part]
        try:
            for direction, found in zip(directions, metric.score(part), strict=True):
                if math.isfinite(number := float(found.score)):
                    scores[direction] = MetricScore(round(number, 4), found.signature)
                else:
                    failed.append(f"{direction}: the metric '{name}' failed (its score is {number})")
        except Exception as error:  # a metric's own code: no decoding must be lost
            failed.append(f"{', '.join(directions)}: the metric '{name}' failed ({type(error).__name__}: {error})")
    return scores, failed
