"""Samples the sentences from which the vocabulary is trained: languages weighted by temperature, with a seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moe_train.config.corpus import VocabularyConfig
from moe_train.data.prepare.splits import Selection


def shares(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """p_l proportional to (n_l / sum n)^(1/T); temperature 1 keeps the data's proportions, infinity makes all equal."""
    total = sum(sizes.values())
    weights = {language: (size / total) ** (1.0 / temperature) for language, size in sizes.items() if size}
    norm = sum(weights.values())
    return {language: weight / norm for language, weight in weights.items()}


def sample_sentences(selections: Sequence[Selection], config: VocabularyConfig, seed: int) -> Iterator[str]:
    """Yields training sentences for SentencePiece; those of a small language may be repeated."""
    sizes: dict[str, int] = defaultdict(int)
    for selection in selections:
        for language in selection.text.sides:
            sizes[language] += int(selection.train.sum())
    budget = min(config.sample_sentences, sum(sizes.values()))
    quota = {language: share * budget for language, share in shares(sizes, config.temperature).items()}
    for number, selection in enumerate(selections):
        rows = np.flatnonzero(selection.train)
        for column, language in enumerate(selection.text.sides):
            wanted = round(quota[language] * len(rows) / sizes[language])
            times = _repetitions(len(rows), wanted, np.random.default_rng([seed, number, column]))
            whole = np.zeros(selection.text.size, dtype=np.int64)
            whole[rows] = times
            for line, count in zip(selection.text.lines(language), whole, strict=True):
                for _ in range(count):
                    yield line


def _repetitions(size: int, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of ``size`` sentences is used so that ``wanted`` are used in all. int64 [size]."""
    times = np.full(size, wanted // size, dtype=np.int64)
    times[generator.choice(size, wanted % size, replace=False)] += 1
    return times
