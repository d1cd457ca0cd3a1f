"""What is translated and what is found: plain values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Batch:
    """A batch to translate: dictionary ids without tags and end symbol.

    Attributes:
        prefixes: tokens with which each translation begins; empty: none is given.
        targets: translations to score, instead of a search for the best; None: a search.
    """

    source: str
    target: str
    sentences: tuple[tuple[int, ...], ...]
    uids: tuple[int, ...]
    prefixes: tuple[tuple[int, ...], ...] = ()
    targets: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class LayerExperts:
    """The experts of a sentence's tokens in one sparse layer.

    Attributes:
        layer: number of the sparse layer in the model, encoder first.
        experts: for each token the experts that it chose, first choice first. With expert choice, those that chose it;
            with strata (SMoE), those of all passes; with slots (Soft MoE), all experts.
        weights: the factor of each expert's output; 0 where the choice was dropped. With slots, the sum of the token's
            weights for the expert's slots.
    """

    layer: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SentenceExperts:
    """The experts of a sentence and its translation.

    Attributes:
        source: the encoder's tokens, tag and end included.
        target: the decoder's input tokens, from the language tag (or end symbol) that starts it; the end that follows
            the last one is no input.
        encoder, decoder: the sparse layers of each, with an entry for each of these tokens.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    encoder: tuple[LayerExperts, ...]
    decoder: tuple[LayerExperts, ...]


@dataclass(frozen=True)
class Hypothesis:
    """A translation that was found, or one that was given and scored.

    Attributes:
        text: detokenised.
        score: summed log-probability (nats) over length^penalty; of a translation that was given, the sum.
        tokens: their number, end symbol included.
        pieces: the tokens, end symbol included.
        token_scores: log-probability of each of them; empty if they were not asked for.
    """

    text: str
    score: float
    tokens: int
    pieces: tuple[str, ...] = ()
    token_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Translation(Hypothesis):
    """The translation of one line.

    Attributes:
        cut: the source, or the translation that was given, was longer than the model's longest and was truncated.
        others: the next best hypotheses, if more than one was asked for.
        experts: the experts of source and translation, if they were asked for.
    """

    cut: bool = False
    others: tuple[Hypothesis, ...] = ()
    experts: SentenceExperts | None = None

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """This one and the others, best first."""
        return (self, *self.others)

    def __str__(self) -> str:
        return self.text


EMPTY = Translation("", 0.0, 0)


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch: a translation per sentence, and the seconds that it took.

    Attributes:
        routing: routing statistics of sources and of all hypotheses that were considered, as plain values.
    """

    translations: tuple[Translation, ...]
    seconds: float
    routing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BatchResult:
        """The inverse of :func:`dataclasses.asdict`, after conversion to JSON and back."""
        translations = tuple(_translation(**one) for one in content["translations"])
        return cls(translations, content["seconds"], content["routing"])


def _translation(others: Sequence[Mapping[str, Any]], **values: Any) -> Translation:
    return replace(Translation(**_tuples(values)), others=tuple(Hypothesis(**_tuples(other)) for other in others))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
