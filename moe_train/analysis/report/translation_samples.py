"""Selects translations for the report: the best, median and worst of each direction by chrF++ of the sentence."""

from __future__ import annotations

from typing import Any

from sacrebleu.metrics.chrf import CHRF

from moe_train.analysis.report.load_runs import RunReport
from moe_train.data.text.lines import read_lines
from moe_train.errors import UserError

_LINES = 600  # of a run that are scored, of all directions together
_FEWEST = 20  # of a direction
_EACH = 2  # translations of each kind


def translation_samples(run: RunReport) -> dict[str, list[dict[str, Any]]]:
    """Direction -> ``kind``, ``line`` (from 1), ``chrf``, ``source``, ``reference`` and ``translation`` of each.

    Scored are the first lines of each direction, about 600 of a run, so that large test sets cost no more. Directions
    whose outputs cannot be read are left out.
    """
    directions = list(run.results.directions) if run.results is not None else []
    limit = max(_FEWEST, _LINES // max(1, len(directions)))
    found = {}
    for direction in directions:
        files = run.files.outputs(direction)
        try:
            hypotheses, references = files.read()
            sources = list(read_lines(files.sources, nul=True)) if files.sources.is_file() else []
        except (OSError, UserError):
            continue
        sources += [""] * (len(hypotheses) - len(sources))
        metric = CHRF(word_order=2)
        scores = [
            metric.sentence_score(line, [reference]).score
            for line, reference in zip(hypotheses[:limit], references[:limit], strict=True)
        ]
        found[direction] = [
            {
                "kind": kind,
                "line": index + 1,
                "chrf": round(scores[index], 1),
                "source": sources[index],
                "reference": references[index],
                "translation": hypotheses[index],
            }
            for kind, index in _chosen(scores)
        ]
    return found


def _chosen(scores: list[float]) -> list[tuple[str, int]]:
    """Kind and index of the chosen lines, none twice."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    middle = max(0, len(order) // 2 - _EACH // 2)
    kinds = {"best": order[:_EACH], "median": order[middle : middle + _EACH], "worst": order[-_EACH:]}
    chosen: dict[int, str] = {}
    for kind, indices in kinds.items():
        for index in indices:
            chosen.setdefault(index, kind)
    return [(kind, index) for index, kind in chosen.items()]
