"""``test.json``: what an evaluation found; a later one of the same checkpoint can add directions to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_train.config import SearchConfig
from moe_train.errors import DataError
from moe_train.evaluation.averages import groups, mean
from moe_train.evaluation.scoring import Scores

FORMAT = 1
BASELINES = ("copy", "shuffled")


@dataclass(frozen=True)
class DirectionResult:
    """Scores of one direction.

    Attributes:
        baselines: ``copy`` (the source as the hypothesis) and ``shuffled`` (the model's own outputs, permuted between
            sentences): what a model that translates must beat.
        words, reference_words: white-space separated words of hypotheses and references.
        tokenizer: sacrebleu's, for BLEU.
    """

    scores: Scores
    baselines: Mapping[str, Scores]
    sentences: int
    words: int
    reference_words: int
    tokenizer: str

    def to_json(self) -> dict[str, Any]:
        """``{"bleu", "chrf", "copy": {…}, "shuffled": {…}, …}``."""
        rest = {name: getattr(self, name) for name in ("sentences", "words", "reference_words", "tokenizer")}
        return {**asdict(self.scores), **{name: asdict(scores) for name, scores in self.baselines.items()}, **rest}

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
        )


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every key of the search: earlier versions have written fewer, and searched by the defaults."""
    return {**settings, "search": {**asdict(SearchConfig()), **settings.get("search", {})}}


def _scores(content: Mapping[str, Any]) -> Scores:
    return Scores(float(content["bleu"]), float(content["chrf"]))


@dataclass(frozen=True)
class Results:
    """The content of ``test.json``.

    Attributes:
        settings: what decides the outputs (checkpoint, search, data …); results of equal settings can be merged.
        tiers: language -> resource tier.
        signatures: ``{"bleu": {tokenizer: signature}, "chrf": signature}``.
        decoding: sentences, tokens, words, seconds, words per second, processes, and what routers counted, of the last
            evaluation.
        notes: what a reader should know about the scores.
    """

    settings: Mapping[str, Any]
    directions: Mapping[str, DirectionResult]
    tiers: Mapping[str, str]
    signatures: Mapping[str, Any]
    decoding: Mapping[str, Any]
    notes: Sequence[str] = ()
    command: Sequence[str] = ()
    versions: Mapping[str, str] | None = None

    def average(self, names: Sequence[str] | None = None, baseline: str | None = None) -> Scores:
        """The mean over directions (all by default) of the model's scores, or of a baseline's."""
        chosen = [self.directions[name] for name in (self.directions if names is None else names)]
        return mean([result.baselines[baseline] if baseline else result.scores for result in chosen])

    @property
    def groups(self) -> dict[str, list[str]]:
        """Directions by group: all, from English, into English, tiers."""
        return groups(list(self.directions), self.tiers)

    def extends(self, earlier: Results) -> bool:
        """Whether both were made with the same settings, so that they can stand in one file."""
        return _with_defaults(earlier.settings) == _with_defaults(self.settings)

    def merged_into(self, earlier: Results | None) -> Results:
        """Adds these directions to earlier results of the same settings; other earlier results are replaced."""
        if earlier is None or not self.extends(earlier):
            return self
        directions = {**earlier.directions, **self.directions}
        bleu = {**earlier.signatures.get("bleu", {}), **self.signatures["bleu"]}
        return replace(
            self,
            directions={name: directions[name] for name in sorted(directions)},
            signatures={**self.signatures, "bleu": bleu},
            notes=list(dict.fromkeys([*earlier.notes, *self.notes])),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; other programs rely on ``directions``, ``average``, ``signatures`` and ``baselines``."""
        averages = {
            name: {**asdict(self.average(members)), "directions": len(members)}
            for name, members in self.groups.items()
            if name != "all"
        }
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "directions": {name: result.to_json() for name, result in self.directions.items()},
            "average": asdict(self.average()),
            "averages": averages,
            "baselines": {name: asdict(self.average(baseline=name)) for name in BASELINES},
            "signatures": dict(self.signatures),
            "tiers": dict(self.tiers),
            "decoding": dict(self.decoding),
            "notes": list(self.notes),
            "command": list(self.command),
            "versions": dict(self.versions or {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is not what that gives.
        """
        directions = {name: DirectionResult.from_json(entry) for name, entry in content["directions"].items()}
        same = ("settings", "tiers", "signatures", "decoding", "notes", "command", "versions")
        return cls(directions=directions, **{name: content[name] for name in same})

    def to_text(self) -> str:
        """The file's content."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"


def read_results(path: Path) -> Results | None:
    """Reads ``test.json``; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return Results.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the scores cannot be read ({error!r})", str(path), "run moe-evaluate again") from error
