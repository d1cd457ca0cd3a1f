"""The data of the report page: what its charts show of each run, as JSON."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from moe_train.analysis.report.atlas_cache import cached_atlas
from moe_train.analysis.report.compare import Comparisons, intervals
from moe_train.analysis.report.leaderboard import ranked, run_cells, unused_speeds
from moe_train.analysis.report.load_runs import RunReport
from moe_train.analysis.report.settings import settings
from moe_train.analysis.report.translation_samples import translation_samples
from moe_train.evaluation.scoring.averages import tier_of
from moe_train.evaluation.scoring.bleu_chrf import CorpusScores
from moe_train.safe_text import for_terminal

_POINTS = 400  # of a curve
_COLUMNS = 160  # of a heat map
_DIGITS = 5  # significant ones
_CURVES = ("nll_loss", "lr", "grad_norm", "dropped_fraction", "words_per_second", "images_per_second")
#: Name of a fact -> its column of the leaderboard.
_FACTS = {
    "routing": "strategy",
    "status": "status",
    "updates": "updates",
    "parameters": "params",
    "active parameters": "active",
    "FLOPs per token, forward": "FLOPs/tok forward",
    "FLOPs per token, training": "FLOPs/tok training",
    "words per second": "words/s",
    "images per second": "images/s",
}


def page_data(runs: Sequence[RunReport], comparisons: Comparisons, max_sentences: int) -> dict[str, Any]:
    """``runs``, best first, and ``baseline``. Strings have no control characters; numbers have five digits."""
    widths, distinct = intervals(runs, comparisons), settings(runs)
    described = [_run(run, widths.get(run.name, {}), distinct[run.name], max_sentences) for run in ranked(runs)]
    content: dict[str, Any] = printable({"runs": described, "baseline": comparisons.baseline})
    return content


def printable(value: Any) -> Any:
    """JSON without control characters in its strings, with rounded numbers, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {for_terminal(str(key)): printable(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return for_terminal(value)
    if isinstance(value, Sequence):
        return [printable(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _run(
    run: RunReport, widths: Mapping[str, CorpusScores], distinct: Sequence[str], max_sentences: int
) -> dict[str, Any]:
    tokens = _Tokens(run.train)
    atlas, missing = cached_atlas(run, max_sentences)
    train = _thinned(run.train, _POINTS)
    speed = run.images_per_second or run.words_per_second
    return {
        "name": run.name,
        "strategy": run.strategy or "?",
        "status": run.status,
        "cause": run.cause,
        "problems": run.problems,
        "settings": distinct,
        "facts": _facts(run),
        "parameters": run.parameters,
        "active": run.active_parameters,
        "flops": run.flops_per_token,
        "training_flops": run.training_flops_per_token,
        "speed": speed,
        "unit": "images/s" if run.images_per_second else "words/s",
        "loss": run.loss,
        "train": _curves(train, [*_CURVES, *_auxiliary(run.train)], tokens),
        "auxiliary": _auxiliary(run.train),
        "valid": _curves([line for line in run.valid if "nll_loss" in line], ["nll_loss"], tokens),
        "layers": {number: run.layers.get(int(number), f"sparse layer {number}") for number in _layers(run.train)},
        "entropy": {layer: _by_layer(train, "router_entropy", layer) for layer in _layers(run.train)},
        "load": {layer: load for layer in _layers(run.train) if (load := _load(run.train, layer))},
        "scores": _scores(run, widths),
        "atlas": atlas,
        "atlas_missing": missing,
        "samples": translation_samples(run),
    }


class _Tokens:
    """Target tokens seen at an update, from the lines of train.jsonl; interpolated between them."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        counted = [line for line in lines if "tokens" in line]
        self._updates = [0.0, *(float(line["update"]) for line in counted)]
        self._sums = list(accumulate((float(line["tokens"]) for line in counted), initial=0.0))

    def at(self, update: float) -> float | None:
        """None where no line says how many tokens an update has."""
        if len(self._updates) < 2:
            return None
        after = min(max(1, bisect_right(self._updates, update)), len(self._updates) - 1)
        first, last = self._updates[after - 1], self._updates[after]
        share = (update - first) / (last - first) if last > first else 1.0
        return self._sums[after - 1] + share * (self._sums[after] - self._sums[after - 1])


def _thinned(lines: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """Evenly spaced lines, with the last one."""
    return lines if len(lines) <= most else [lines[(index + 1) * len(lines) // most - 1] for index in range(most)]


def _curves(lines: Sequence[Mapping[str, Any]], names: Sequence[str], tokens: _Tokens) -> dict[str, list[Any]]:
    """Values by name, without those that no line has; ``update`` and ``tokens`` of each line."""
    curves = {name: [line.get(name) for line in lines] for name in names}
    present = {name: values for name, values in curves.items() if any(value is not None for value in values)}
    updates = [int(line["update"]) for line in lines]
    seen = [tokens.at(update) for update in updates]
    return {"update": updates, "tokens": [None if count is None else round(count) for count in seen], **present}


def _auxiliary(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({key for line in lines for key in line if key.endswith("_loss") and key != "nll_loss"})


def _layers(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {layer for line in lines for layer in line.get("load", {})}
    return sorted((layer for layer in found if layer.isdecimal() and len(layer) < 6), key=int)


def _by_layer(lines: Sequence[Mapping[str, Any]], name: str, layer: str) -> list[float | None]:
    return [line.get(name, {}).get(layer) for line in lines]


def _load(lines: Sequence[Mapping[str, Any]], layer: str) -> dict[str, Any]:
    """``update`` [N] and ``load`` [E, N], as multiples of the mean: 1 is balanced, 0 is dead."""
    points = [line for line in lines if layer in line.get("load", {})]
    sizes = {len(line["load"][layer]) for line in points}
    if len(sizes) != 1:
        return {}
    shown, experts = _thinned(points, _COLUMNS), sizes.pop()
    rows = [[line["load"][layer][expert] * experts for line in shown] for expert in range(experts)]
    return {"update": [int(line["update"]) for line in shown], "load": rows}


def _scores(run: RunReport, widths: Mapping[str, CorpusScores]) -> dict[str, Any]:
    results = run.results
    if results is None:
        return {}
    directions = [
        {
            "name": name,
            "tier": tier_of(name, results.tiers),
            "lines": result.sentences,
            **asdict(result.scores),
            "metrics": dict(result.metrics),
            "interval": asdict(widths[name]) if name in widths else None,
            **{baseline: asdict(scores) for baseline, scores in result.baselines.items()},
        }
        for name, result in results.directions.items()
    ]
    groups = {
        "average" if name == "all" else name: {"directions": len(members), **asdict(results.average(members))}
        for name, members in results.groups.items()
    }
    signatures = [f"{name}: {signature}" for name, signature in results.signature_lines]
    return {"directions": directions, "groups": groups, "notes": [*signatures, *results.notes]}


def _facts(run: RunReport) -> list[tuple[str, str]]:
    cells, unused = run_cells(run), unused_speeds([run])
    facts = {"run": str(run.path), **{name: cells[column] for name, column in _FACTS.items() if column not in unused}}
    if run.loss is not None:
        facts["lowest valid nll"] = f"{run.loss:.4f} nats per token"
    if world := run.info.get("world"):
        facts["processes"] = (
            f"{world.get('processes')} on {world.get('device')}, expert parallel {world.get('expert_parallel')}"
        )
    facts |= {name: str(run.info[name]) for name in ("commit", "host", "started", "seed") if run.info.get(name)}
    if run.overrides:
        facts["overrides"] = " ".join(run.overrides)
    return list(facts.items())
