"""Registry of metrics that ``moe-evaluate metrics=[…]`` computes in addition to BLEU and chrF++."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from moe_train.errors import ConfigError
from moe_train.plugins import load_plugin, offer_names

#: Hypotheses, references (aligned sentence by sentence, detokenised), target language -> score of the corpus.
Metric = Callable[[Sequence[str], Sequence[str], str], float]
M = TypeVar("M", bound=Metric)
BUILT_IN = ("bleu", "chrf")  # always computed (moe_train.evaluation.scoring.bleu_chrf)
# Keys of test.json next to the scores, which cannot be names of metrics.
TAKEN = (*BUILT_IN, "copy", "shuffled", "sentences", "words", "reference_words", "tokenizer", "zero_shot", "directions")

_METRICS: dict[str, Metric] = {}


def register_metric(name: str) -> Callable[[M], M]:
    """Decorator that registers a metric for ``metrics=[name]``; its scores have the key ``name`` in ``test.json``.

    Raises:
        ValueError: the name is in use.
    """

    def add(metric: M) -> M:
        if name in _METRICS or name in TAKEN:
            raise ValueError(f"the name of the metric {name!r} is in use")
        _METRICS[name] = metric
        return metric

    return add


def find_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics with these names, in their order, without those that are always computed.

    Raises:
        ConfigError: a name is unknown, or its plug-in is broken.
    """
    found = {}
    for name in names:
        if name in BUILT_IN:
            continue
        load_plugin("metrics", name, _METRICS)
        if name not in _METRICS:
            remedy = offer_names("metrics", name, [*_METRICS, *BUILT_IN])
            raise ConfigError(f"there is no metric '{name}'", "metrics", remedy)
        found[name] = _METRICS[name]
    return found


def measure_with(metric: Metric, hypotheses: Sequence[str], references: Sequence[str], language: str) -> float:
    """The score of a corpus.

    Raises:
        ValueError: the metric failed or its score is not finite. Callers catch it, so that no decoding is lost.
    """
    try:
        score = float(metric(hypotheses, references, language))
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise ValueError(f"its score is {score}")
    return round(score, 4)
