"""The sets of sentences of scores and validation losses, and notes where those of several runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_train.analysis.report.load_runs import RunReport
from moe_train.evaluation.scoring.results import Results
from moe_train.utils.regular_files import LARGEST_LOG, read_regular

_CHECKSUMS = ("data folder", "vocabulary")  # their values are not shown
SETS = ("run", "scored on", "checkpoint", "directions", "lines", "tokenizers")


def set_cells(run: RunReport) -> dict[str, str]:
    """Cells by name of the column for the set on which a run was scored; empty where it has no scores."""
    results = run.results
    if results is None:
        return {}
    limit = _limit(results)
    return {
        "run": run.name,
        "scored on": f"{run.files.split}, first {limit:,}" if limit else run.files.split,
        "checkpoint": str(results.settings.get("checkpoint", "?")),
        "directions": f"{len(results.directions):,}",
        "lines": f"{sum(entry.sentences for entry in results.directions.values()):,}",
        "tokenizers": ", ".join(sorted({entry.tokenizer for entry in results.directions.values()})),
    }


def differing_sets(runs: Sequence[RunReport]) -> list[str]:
    """Reasons why scores or validation losses of the runs cannot be compared."""
    scored = {run.name: run.results for run in runs if run.results is not None}
    return [
        *_limited(runs),
        *_uneven_directions(scored),
        *_differing(scored, "numbers of lines", lambda results, name: results.directions[name].sentences),
        *_differing(scored, "BLEU tokenizers", lambda results, name: results.directions[name].tokenizer),
        *_differing(scored, "signatures of sacrebleu", _signature),
        *_other_texts(runs),
        *_differing_losses([run for run in runs if run.loss is not None]),
    ]


def _limit(results: Results) -> int:
    """Limit on lines of each direction; 0: none."""
    limit = results.settings.get("max_sentences")
    return limit if isinstance(limit, int) else 0


def _limited(runs: Sequence[RunReport]) -> list[str]:
    """Notes on scores of the whole split that are of a part (earlier versions wrote such), and on missing ones."""
    notes = []
    for run in runs:
        limit = 0 if run.results is None else _limit(run.results)
        if limit and not run.files.part:
            notes.append(f"{run.name}: scored on the first {limit:,} lines of each direction, not on the whole split")
        others = sorted(path.name for path in run.path.glob(f"{run.files.split}.*.json") if "replaced" not in path.name)
        if run.results is None and others:
            notes.append(f"{run.name}: no scores in {run.files.scores.name}; there are {', '.join(others)} (part=…)")
    return notes


def _uneven_directions(scored: Mapping[str, Results]) -> list[str]:
    sizes = {frozenset(results.directions): len(results.directions) for results in scored.values()}
    if len(sizes) < 2:
        return []
    fewest, most = min(sizes.values()), max(sizes.values())
    return [f"runs were scored in different directions ({fewest} to {most} of them): their averages cannot be compared"]


def _differing(scored: Mapping[str, Results], what: str, value: Any) -> list[str]:
    """A note that names the first direction in which ``value(results, direction)`` differs between runs."""
    differing = []
    for direction in sorted({name for results in scored.values() for name in results.directions}):
        found = {run: value(results, direction) for run, results in scored.items() if direction in results.directions}
        if len(set(found.values())) > 1:
            differing.append((direction, found))
    if not differing:
        return []
    direction, found = differing[0]
    more = f" (and in {len(differing) - 1} more directions)" if len(differing) > 1 else ""
    return [
        f"runs were scored with different {what}: in {direction} {_by_value(found)}{more}. "
        "Their scores cannot be compared"
    ]


def _signature(results: Results, direction: str) -> str:
    bleu = results.signatures["bleu"].get(results.directions[direction].tokenizer, "")
    return f"{bleu} {results.signatures['chrf']}"


def _other_texts(runs: Sequence[RunReport]) -> list[str]:
    """A note where sources or references differ between runs."""
    texts: dict[str, dict[str, str]] = {}
    for run in runs:
        for direction in run.results.directions if run.results is not None else ():
            files = run.files.outputs(direction)
            try:
                sources, references = (read_regular(path, LARGEST_LOG) for path in (files.sources, files.references))
            except OSError:
                continue
            texts.setdefault(direction, {})[run.name] = hashlib.sha256(sources + b"\0" + references).hexdigest()
    unlike = sorted(direction for direction, found in texts.items() if len(set(found.values())) > 1)
    if not unlike:
        return []
    more = f" and {len(unlike) - 1} more directions" if len(unlike) > 1 else ""
    return [f"runs were scored on other texts in {unlike[0]}{more}: their scores cannot be compared there"]


def _differing_losses(runs: Sequence[RunReport]) -> list[str]:
    """Losses per token are comparable only on the same sentences and pieces; unknown values are skipped."""
    notes = []
    for key in runs[0].validated_on if runs else ():
        known = {run.name: run.validated_on[key] for run in runs if run.validated_on.get(key) is not None}
        found = {name: json.dumps(value, sort_keys=True, default=str) for name, value in known.items()}
        if len(set(found.values())) > 1:
            shown = _by_value(found, named=key not in _CHECKSUMS)
            notes.append(f"valid nll is of sets with different {key}, {shown}: it cannot be compared")
    return notes


def _by_value(found: Mapping[str, Any], named: bool = True) -> str:
    """Such as ``5 (a, b), 20 (c)``; without the values ``(a, b), (c)``."""
    by_value: dict[Any, list[str]] = {}
    for run, value in found.items():
        by_value.setdefault(value, []).append(run)
    return ", ".join(f"{f'{value} ' if named else ''}({_few(names)})" for value, names in by_value.items())


def _few(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if len(rest) > 1 else ", ".join([first, *rest])
