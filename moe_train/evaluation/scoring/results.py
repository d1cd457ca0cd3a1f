"""The content of ``test.json``: scores of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config import SearchConfig
from moe_train.data.text.pairs import is_pair
from moe_train.errors import DataError
from moe_train.evaluation.scoring.averages import group_directions, mean
from moe_train.evaluation.scoring.bleu_chrf import CorpusScores
from moe_train.evaluation.scoring.examples import Example
from moe_train.evaluation.scoring.further_metrics import TAKEN
from moe_train.utils.json_files import finite, read_object

FORMAT = 1
BASELINES = ("copy", "shuffled")


@dataclass(frozen=True)
class DirectionResult:
    """Scores of one direction.

    Attributes:
        baselines: ``copy`` (the source as the hypothesis) and ``shuffled`` (the model's own outputs, permuted between
            sentences): lower bounds that a trained model must exceed.
        words, reference_words: white-space separated words of hypotheses and references.
        tokenizer: sacrebleu's, for BLEU.
        metrics: scores of further metrics (:mod:`moe_train.evaluation.scoring.further_metrics`).
        zero_shot: the direction was not trained.
    """

    scores: CorpusScores
    baselines: Mapping[str, CorpusScores]
    sentences: int
    words: int
    reference_words: int
    tokenizer: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    zero_shot: bool = False

    def to_json(self) -> dict[str, Any]:
        """``{"bleu", "chrf", "copy": {…}, "shuffled": {…}, …}``, further metrics under their names."""
        rest = {name: getattr(self, name) for name in ("sentences", "words", "reference_words", "tokenizer")}
        baselines = {name: asdict(scores) for name, scores in self.baselines.items()}
        zero_shot = {"zero_shot": True} if self.zero_shot else {}
        return {**self.metrics, **asdict(self.scores), **baselines, **rest, **zero_shot}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DirectionResult:
        """The inverse of :meth:`to_json`."""
        return cls(
            _scores(content),
            {name: _scores(content[name]) for name in BASELINES},
            int(content["sentences"]),
            int(content["words"]),
            int(content["reference_words"]),
            str(content["tokenizer"]),
            {name: score for name in content if name not in TAKEN and (score := finite(content[name])) is not None},
            bool(content.get("zero_shot", False)),
        )


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every key of the search; earlier versions wrote fewer and used today's defaults for the others."""
    return {**settings, "search": {**asdict(SearchConfig()), **settings.get("search", {})}}


def _scores(content: Mapping[str, Any]) -> CorpusScores:
    bleu, chrf = (finite(content[name]) for name in ("bleu", "chrf"))
    if bleu is None or chrf is None:
        raise ValueError("a score is not a number")
    return CorpusScores(bleu, chrf)


@dataclass(frozen=True)
class Results:
    """The content of ``test.json``.

    Attributes:
        settings: those that determine the outputs (checkpoint, search, data …).
        tiers: language -> resource tier.
        signatures: ``{"bleu": {tokenizer: signature}, "chrf": signature}``; further metrics have lists.
        decoding: sentences, tokens, words, seconds, words per second, processes, and routing statistics, of the last
            evaluation.
        notes: remarks on the scores for the reader.
        examples: sentences to print.
    """

    settings: Mapping[str, Any]
    directions: Mapping[str, DirectionResult]
    tiers: Mapping[str, str]
    signatures: Mapping[str, Any]
    decoding: Mapping[str, Any]
    notes: Sequence[str] = ()
    command: Sequence[str] = ()
    versions: Mapping[str, str] | None = None
    examples: Sequence[Example] = ()

    def average(self, names: Sequence[str] | None = None, baseline: str | None = None) -> CorpusScores:
        """The mean over directions (all by default) of the model's scores, or of a baseline's."""
        chosen = [self.directions[name] for name in (self.directions if names is None else names)]
        return mean([result.baselines[baseline] if baseline else result.scores for result in chosen])

    @property
    def signature_lines(self) -> list[tuple[str, str]]:
        """Name of the metric and signature, of all metrics."""
        further = [(name, text) for name in self.metrics for text in self.signatures.get(name, ())]
        bleu = [("BLEU", text) for text in self.signatures.get("bleu", {}).values()]
        return [*bleu, ("chrF++", self.signatures.get("chrf", "")), *further]

    @property
    def metrics(self) -> list[str]:
        """Further metrics that any direction has."""
        return list(dict.fromkeys(name for result in self.directions.values() for name in result.metrics))

    def average_metrics(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """The mean of each further metric over directions (all by default); none where a direction lacks it."""
        chosen = [self.directions[name].metrics for name in (self.directions if names is None else names)]
        shared = [metric for metric in self.metrics if all(metric in scores for scores in chosen)]
        return {metric: round(sum(scores[metric] for scores in chosen) / len(chosen), 4) for metric in shared}

    @property
    def groups(self) -> dict[str, list[str]]:
        """Directions by group: all, from English, into English, tiers; zero-shot ones apart where there are both."""
        zero_shot = [name for name, result in self.directions.items() if result.zero_shot]
        found = group_directions(list(self.directions), self.tiers)
        if zero_shot and len(zero_shot) < len(self.directions):
            found["trained"] = [name for name in self.directions if name not in zero_shot]
            found["zero-shot"] = zero_shot
        return found

    def replaces(self, earlier: Results) -> bool:
        """Whether these contain all of the earlier results: same settings, no direction or metric missing."""
        same = _with_defaults(earlier.settings) == _with_defaults(self.settings)
        more = earlier.directions.keys() <= self.directions.keys() and set(earlier.metrics) <= set(self.metrics)
        return same and more

    def to_json(self) -> dict[str, Any]:
        """JSON values; other programs read ``directions``, ``average``, ``signatures`` and ``baselines``."""
        averages = {
            name: {**self.average_metrics(members), **asdict(self.average(members)), "directions": len(members)}
            for name, members in self.groups.items()
            if name != "all"
        }
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "directions": {name: result.to_json() for name, result in self.directions.items()},
            "average": {**self.average_metrics(), **asdict(self.average())},
            "averages": averages,
            "baselines": {name: asdict(self.average(baseline=name)) for name in BASELINES},
            "signatures": dict(self.signatures),
            "tiers": dict(self.tiers),
            "decoding": dict(self.decoding),
            "notes": list(self.notes),
            "command": list(self.command),
            "versions": dict(self.versions or {}),
            **({"examples": [entry.to_json() for entry in self.examples]} if self.examples else {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError: the content is not valid.
        """
        _check(content)
        directions = {name: DirectionResult.from_json(entry) for name, entry in content["directions"].items()}
        examples = [Example.from_json(entry) for entry in content.get("examples", [])]
        return cls(directions=directions, examples=examples, **{name: content[name] for name in _KINDS})

    def to_text(self) -> str:
        """The file's content."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"


def read_results(path: Path) -> Results | None:
    """Reads ``test.json``; None where it does not exist, or is of a task that does not translate.

    Raises:
        DataError: it cannot be read.
    """
    remedy = "run moe-evaluate again"
    content = read_object(path, remedy)
    if content is None or ("sets" in content and "directions" not in content):
        return None
    try:
        return Results.from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"the scores cannot be read ({error!r})", str(path), remedy) from error


_KINDS: Mapping[str, type] = {
    "settings": dict,
    "tiers": dict,
    "signatures": dict,
    "decoding": dict,
    "notes": list,
    "command": list,
    "versions": dict,
}


def _check(content: Mapping[str, Any]) -> None:
    """Checks the types of all values that are shown.

    Raises:
        TypeError, ValueError, KeyError: one is missing or has another type.
    """
    for name, kind in _KINDS.items():
        if not isinstance(content[name], kind):
            raise TypeError(f"'{name}' is a {type(content[name]).__name__}")
    if not isinstance(content["settings"].get("search", {}), dict):
        raise TypeError("'search' is not a mapping")
    if not content["directions"]:
        raise ValueError("no directions")
    for direction in content["directions"]:
        if not is_pair(direction):  # it becomes part of file names
            raise ValueError(f"'{direction[:60]}' is not a direction")
    texts = [*content["tiers"].values(), *content["notes"], *content["signatures"]["bleu"].values()]
    further = [found for name, found in content["signatures"].items() if name not in ("bleu", "chrf")]
    if not all(isinstance(found, list) for found in further):
        raise TypeError("the signatures of a metric are not a list")
    texts += [text for found in further for text in found]
    if not all(isinstance(text, str) for text in [*texts, content["signatures"]["chrf"]]):
        raise TypeError("a tier, note or signature is not a string")
