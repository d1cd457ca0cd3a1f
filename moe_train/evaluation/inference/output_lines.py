"""Lines that moe-translate writes for a line of its input: text, a table of hypotheses, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_train.evaluation.hypothesis_files import table_rows
from moe_train.evaluation.long_lines import join_parts
from moe_train.evaluation.translations import Hypothesis, Translation

OutputLines = Callable[[int, Translation, int], list[str]]  # (number of the input line, its translation, n_best)


def text_lines(number: int, translation: Translation, n_best: int) -> list[str]:
    """``n_best`` lines, best first; blank ones where fewer hypotheses were found."""
    texts = [hypothesis.text for hypothesis in translation.hypotheses]
    return [*texts, *[""] * (n_best - len(texts))]


def json_lines(number: int, translation: Translation, n_best: int) -> list[str]:
    """One object; ``translations`` is empty for a blank line."""
    found = [hypothesis_values(hypothesis) for hypothesis in translation.hypotheses if hypothesis.pieces]
    content = {"line": number, "cut": translation.cut, "translations": found}
    return [json.dumps(content, ensure_ascii=False, allow_nan=False)]


def hypothesis_values(hypothesis: Hypothesis) -> dict[str, Any]:
    """JSON values of a hypothesis; ``pieces`` and ``token_scores`` if it has token scores."""
    score = hypothesis.score if math.isfinite(hypothesis.score) else None
    values: dict[str, Any] = {"text": hypothesis.text, "score": score, "tokens": hypothesis.tokens}
    if hypothesis.token_scores:
        values.update(pieces=hypothesis.pieces, token_scores=hypothesis.token_scores)
    return values


OUTPUTS: Mapping[str, OutputLines] = {
    "text": text_lines,
    "tsv": lambda number, translation, n_best: table_rows(number, translation),
    "json": json_lines,
}


def join_translations(parts: Sequence[Translation], length_penalty: float) -> Translation:
    """Translations of the parts of a line as the one of the line, without further hypotheses."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts) or 1
    summed = sum(part.score * part.tokens**length_penalty for part in parts)
    return Translation(
        join_parts([part.text for part in parts]),
        round(summed / tokens**length_penalty, 6),
        tokens,
        tuple(piece for part in parts for piece in part.pieces),
        tuple(score for part in parts for score in part.token_scores),
        any(part.cut for part in parts),
    )
