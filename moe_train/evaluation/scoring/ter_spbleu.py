"""``metrics=[ter,spbleu]``: TER and spBLEU of detokenised text by sacrebleu.

TER (Snover et al., 2006) counts the edits per word that turn a hypothesis into its reference: 0 is best. spBLEU (Goyal
et al., 2022) is BLEU over the pieces of one SentencePiece model for all languages, so that scores of different scripts
can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_base import BaseTokenizer
from sentencepiece import SentencePieceProcessor

from moe_train.config import build
from moe_train.data.text.languages import Language
from moe_train.data.text.lines import sha256
from moe_train.errors import DataError
from moe_train.evaluation.scoring.bleu_chrf import require_tokenizer
from moe_train.evaluation.scoring.further_metrics import Corpus, CorpusMetric, MetricScore

_IDEOGRAPHIC = frozenset(("Hans", "Hant", "Hanb", "Jpan", "Hira", "Kana", "Hrkt"))


class TranslationEditRate(CorpusMetric):
    """TER with sacrebleu's defaults; Chinese and Japanese, which write no spaces, are split into characters."""

    def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
        """Edits per 100 words of the reference."""
        found = []
        for corpus in corpora:
            split = Language.of(corpus.target).script in _IDEOGRAPHIC
            metric = TER(normalized=split, asian_support=split)
            score = metric.corpus_score(corpus.hypotheses, [corpus.references]).score
            found.append(MetricScore(score, str(metric.get_signature())))
        return found


@dataclass(frozen=True)
class SpBleuSettings:
    """``metric.spbleu``.

    Attributes:
        tokenizer: sacrebleu's; its SentencePiece model must be in sacrebleu's folder.
        model: a SentencePiece model to use instead.
    """

    tokenizer: Literal["flores200", "flores101", "spBLEU-1K"] = "flores200"
    model: str | None = None


class SpBleu(CorpusMetric):
    """BLEU over SentencePiece pieces."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        own = build(SpBleuSettings, settings, "metric.spbleu")
        if own.model is None:
            require_tokenizer(own.tokenizer, "give another one with metric.spbleu.model=FILE")
        self._bleu = BLEU(tokenize=own.tokenizer if own.model is None else "none", force=True)
        if own.model is not None:
            self._bleu.tokenizer = Pieces(Path(own.model).expanduser())
            self._bleu.tokenizer_signature = self._bleu.tokenizer.signature()

    def score(self, corpora: Sequence[Corpus]) -> Sequence[MetricScore]:
        """BLEU, 0 to 100."""
        scores = [self._bleu.corpus_score(c.hypotheses, [c.references]).score for c in corpora]
        return [MetricScore(score, str(self._bleu.get_signature())) for score in scores]


class Pieces(BaseTokenizer):
    """sacrebleu's tokenizer of SentencePiece models, with any file; its signature has the file's SHA-256.

    Raises:
        DataError: the file is missing or no SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
            self._digest = sha256(path)
        except (OSError, RuntimeError) as error:
            what = f"the SentencePiece model of spBLEU cannot be read ({error})"
            raise DataError(what, f"metric.spbleu.model={path}", "name the file of a SentencePiece model") from error

    def signature(self) -> str:
        """For sacrebleu's signature."""
        return f"spm-{self._digest[:12]}"

    def __call__(self, line: str) -> str:
        """The pieces of a line, separated by spaces."""
        return " ".join(self._model.encode(line, out_type=str))
