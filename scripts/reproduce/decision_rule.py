"""The rule by which a claim "A is above B" is decided from runs of several seeds on the same test sentences.

The effect of a seed is the difference of the two models' BLEU, each the mean over directions. Two things make the mean
effect over n seeds uncertain, and their variances add up:

- seeds: the sample variance of the effects, over n;
- sentences: the variance of the mean effect when test lines are drawn with replacement (paired bootstrap: the same
  lines for all models, seeds and directions, since languages share English lines).

The interval is that of Student's t with Welch and Satterthwaite's degrees of freedom, at a level of 5 % divided by the
number of claims (Bonferroni). The decision is

- ``equal within ±0.5``: the interval lies within ±0.5 BLEU (two one-sided tests; Schuirmann, 1987);
- ``above``, ``below``: else, and it does not contain 0;
- ``undecided``: else, with the number of seeds that would decide, were the effect and the variances the same.

With one seed the variance of seeds is unknown: the interval is that of the sentences, and the decision ``one seed``.
This rule was committed before the first run of the study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import t as student

LEVEL, MARGIN = 0.05, 0.5
MOST_SEEDS = 50  # beyond these "more seeds" is no practical advice

Counts = NDArray[np.int64]  # [lines, 2 + 2 n]: lengths of hypothesis and reference, correct and total n-grams


@dataclass(frozen=True)
class Decision:
    """What the runs say of a claim.

    Attributes:
        outcome: ``above``, ``below``, ``equal within ±0.5``, ``undecided`` or ``one seed``.
        effect: mean difference in BLEU; ``low`` to ``high``: its interval.
        effects: of every seed.
        by_seeds, by_sentences: standard errors of the mean effect.
        remedy: what would decide an undecided claim.
    """

    outcome: str
    effect: float
    low: float
    high: float
    effects: tuple[float, ...]
    by_seeds: float
    by_sentences: float
    remedy: str = ""

    def text(self) -> str:
        """Such as ``+0.81 BLEU [+0.35, +1.27], 3 seeds``."""
        seeds = f"{len(self.effects)} seed{'s' * (len(self.effects) > 1)}"
        return f"{self.effect:+.2f} BLEU [{self.low:+.2f}, {self.high:+.2f}], {seeds}"


def decide(effects: Sequence[float], sentence_error: float, claims: int) -> Decision:
    """The decision on one of ``claims`` claims.

    Args:
        effects: difference in BLEU of each seed.
        sentence_error: standard error of their mean due to the test sentences.
    """
    effect, n = statistics.fmean(effects), len(effects)
    deviation = statistics.stdev(effects) if n > 1 else 0.0
    half = half_width(deviation, n, sentence_error, claims)
    low, high = effect - half, effect + half
    outcome = "one seed" if n == 1 else judged(low, high)
    remedy = more_seeds(effect, deviation, n, sentence_error, claims) if outcome == "undecided" else ""
    return Decision(outcome, effect, low, high, tuple(effects), deviation / math.sqrt(n), sentence_error, remedy)


def judged(low: float, high: float) -> str:
    """The outcome of an interval."""
    if low >= -MARGIN and high <= MARGIN:
        return f"equal within ±{MARGIN}"
    return "above" if low > 0 else "below" if high < 0 else "undecided"


def half_width(deviation: float, seeds: int, sentence_error: float, claims: int) -> float:
    """Half the width of the interval at the corrected level."""
    by_seeds = deviation**2 / seeds
    variance = by_seeds + sentence_error**2
    if variance == 0:
        return 0.0
    freedom = (seeds - 1) * (variance / by_seeds) ** 2 if by_seeds else math.inf
    return float(student.ppf(1 - LEVEL / claims / 2, freedom)) * math.sqrt(variance)


def more_seeds(effect: float, deviation: float, seeds: int, sentence_error: float, claims: int) -> str:
    """How many seeds would decide, were effect and variances those measured."""
    for more in range(seeds + 1, MOST_SEEDS + 1):
        half = half_width(deviation, more, sentence_error, claims)
        if judged(effect - half, effect + half) != "undecided":
            return f"{more} seeds would decide"
    return "more test sentences or tokens are needed: no number of seeds up to 50 would decide"


def line_counts(hypotheses: Sequence[str], references: Sequence[str], tokenizer: str) -> Counts:
    """[lines, 10] what BLEU needs of every line: lengths, and correct and total 1- to 4-grams."""
    metric = BLEU(tokenize=tokenizer, force=True)
    return np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.int64)


def bleu(total: Counts) -> float:
    """Corpus BLEU of summed counts [10]."""
    values = [int(value) for value in total]
    order = (len(values) - 2) // 2
    return float(
        BLEU.compute_bleu(
            correct=values[2 : 2 + order], total=values[2 + order :], sys_len=values[0], ref_len=values[1]
        ).score
    )


def mean_bleu(directions: Sequence[Counts], lines: NDArray[np.int64] | None = None) -> float:
    """Mean over directions of the corpus BLEU of all lines, or of the drawn ones."""
    return statistics.fmean(bleu((d if lines is None else d[lines]).sum(axis=0)) for d in directions)


def sentence_error(
    ones: Sequence[Sequence[Counts]], others: Sequence[Sequence[Counts]], samples: int = 500, seed: int = 1
) -> float:
    """Standard error of the mean effect over seeds due to the choice of test sentences.

    Args:
        ones, others: seed -> direction -> counts, of the two models; all directions have as many lines.
    """
    size = len(ones[0][0])
    generator = np.random.default_rng(seed)
    effects = []
    for _ in range(samples):
        drawn = generator.integers(0, size, size)
        pairs = zip(ones, others, strict=True)
        effects.append(statistics.fmean(mean_bleu(one, drawn) - mean_bleu(other, drawn) for one, other in pairs))
    return statistics.stdev(effects)
