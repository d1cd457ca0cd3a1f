"""Writes a page over committed studies: claims and their outcome, measures of variants, learning curves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.analysis.report.page_data import printable
from moe_train.analysis.report.report_page import fill_page, html_table, page_section
from moe_train.errors import ConfigError
from moe_train.utils.json_files import finite
from moe_train.utils.regular_files import read_regular

_CURVE = ("tokens", "flops", "nll")


def study_page(folder: Path) -> str:
    """The page over the JSON files of a folder such as ``results/``: studies, and searches for a recipe.

    Raises:
        ConfigError: the folder has neither.
        MissingDependency: plotly is not installed.
    """
    contents = {path.stem: content for path in sorted(folder.glob("*.json")) if (content := _read(path)) is not None}
    studies = [printable(_study(name, content)) for name, content in contents.items() if _is_study(content)]
    searches = [printable(_search(name, content)) for name, content in contents.items() if _is_search(content)]
    if not studies and not searches:
        raise ConfigError("there are no results of studies here", str(folder), "name the folder of their JSON files")
    header = ("study", "variants", "runs", "core-minutes", "claims", "outcome of the claims")
    overview = html_table(header, [_row(study) for study in studies], header[1:5])
    data = {"studies": studies, "searches": searches}
    return fill_page("Results", "study", page_section("overview", "Studies", overview), data)


def _read(path: Path) -> Any:
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None


def _is_study(content: Any) -> bool:
    kinds = {"runs": dict, "summary": dict, "claims": list, "title": str}
    return isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items())


def _is_search(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(entry, dict) and "curve" in entry for entry in content)


def _study(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    runs = [run for run in content["runs"].values() if isinstance(run, dict)]
    summary = {variant: found for variant, found in content["summary"].items() if isinstance(found, dict)}
    machine = content.get("machine", {})
    return {
        "name": name,
        "title": content["title"],
        "claims": [claim for claim in content["claims"] if isinstance(claim, dict)],
        "notes": content.get("notes", []),
        "made": f"{' '.join(map(str, content.get('command', [])))}, at commit {content.get('commit', '?')}, on "
        f"{machine.get('cores', '?')} cores of {machine.get('processor', '?')}, {machine.get('device', '?')}",
        "runs": len(runs),
        "minutes": sum(finite(run.get("seconds")) or 0.0 for run in runs) / 60,
        "variants": [
            _variant(variant, found, [run for run in runs if run.get("variant") == variant])
            for variant, found in summary.items()
        ],
    }


def _variant(name: str, summary: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = runs[0] if runs else {}
    curves = [curve for run in runs if (curve := (run.get("details") or {}).get("curve"))]
    return {
        "name": name,
        "seeds": len(runs),
        "parameters": (first.get("parameters") or {}).get("total"),
        "flops": first.get("flops_per_token"),
        "measures": {
            measure: {"mean": found["mean"], "deviation": found.get("deviation"), "values": found.get("values", [])}
            for measure, found in summary.items()
            if isinstance(found, dict) and finite(found.get("mean")) is not None
        },
        "curves": [{key: [point.get(key) for point in curve] for key in _CURVE} for curve in curves],
    }


def _search(name: str, entries: Sequence[Any]) -> dict[str, Any]:
    """Candidates, lowest loss first; the tokens of a point are its updates times the target tokens of an update."""
    candidates = []
    for entry in entries:
        if not isinstance(entry, dict) or finite(entry.get("bits_per_character")) is None:
            continue
        per_update = _tokens_per_update(entry)
        updates = [finite(point.get("update")) or 0.0 for point in entry.get("curve", [])]
        tokens = [update * per_update for update in updates]
        flops = finite(entry.get("flops_per_token")) or 0.0
        candidates.append(
            {
                "name": str(entry.get("name", "?")),
                "changes": " ".join(f"{key}={value}" for key, value in entry.get("changes", {}).items()),
                "bits": entry["bits_per_character"],
                "nll": entry.get("nll"),
                "minutes": entry.get("core_minutes"),
                "parameters": (entry.get("parameters") or {}).get("total"),
                "tokens": tokens,
                "flops": [3 * flops * count for count in tokens],
                "curve": [point.get("bits_per_character") for point in entry.get("curve", [])],
            }
        )
    return {"name": name, "candidates": sorted(candidates, key=lambda found: float(found["bits"]))}


def _tokens_per_update(entry: Mapping[str, Any]) -> float:
    """Settings of a recipe are words of a command line; 0 where they do not say it."""
    try:
        return float(entry.get("settings", {}).get("training.tokens_per_update", 0))
    except (TypeError, ValueError):
        return 0.0


def _row(study: Mapping[str, Any]) -> list[str]:
    outcomes = Counter(str(claim.get("agrees", "?")) for claim in study["claims"]).most_common()
    counts = len(study["variants"]), study["runs"], f"{study['minutes']:,.0f}", len(study["claims"])
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes)
    return [study["name"], *map(str, counts), told]
