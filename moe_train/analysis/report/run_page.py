"""Writes ``report.html``: facts, curves, load of experts, scores. One file, without scripts or network access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_train.analysis.report import figures
from moe_train.analysis.report.leaderboard import run_cells, unused_speeds
from moe_train.analysis.report.load_runs import RunReport
from moe_train.analysis.report.sentence_sets import set_cells
from moe_train.evaluation.scoring.averages import tier_of
from moe_train.evaluation.scoring.results import BASELINES, Results
from moe_train.safe_text import for_html

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text { text-align: left; }
.failed { color: #a00; }
svg { max-width: 100%; height: auto; }
code { overflow-wrap: anywhere; }
"""
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


def run_page(run: RunReport) -> str:
    """The page's HTML. Sections without content are left out.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    parts = [f"<h1>{for_html(run.name)}</h1>", _facts(run)]
    if run.failed:
        parts.append(f'<p class="failed">Failed: {for_html(run.cause)}</p>')
    parts += [f'<p class="failed">{for_html(problem)}</p>' for problem in run.problems]
    parts += _section("Loss", [figures.loss_curves(run.train, run.valid)])
    parts += _section("Routing losses", [figures.auxiliary_curves(run.train)])
    parts += _section("Load per expert", _loads(run.train))
    if run.results is not None:
        of = ", ".join(f"{name} {value}" for name, value in list(set_cells(run).items())[1:])
        parts += _section("Scores", [f"<p>{for_html(of)}</p>", _scores(run.results)])
    parts += _section("Speed", [figures.speed_curve(run.train)])
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{for_html(run.name)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, content: Sequence[str]) -> list[str]:
    return [f"<h2>{for_html(title)}</h2>", *content] if any(content) else []


def _facts(run: RunReport) -> str:
    found = run_cells(run)
    unused = unused_speeds([run])
    facts = {name: found[column] for name, column in _FACTS.items() if column not in unused}
    rows = {"run": str(run.path), **facts}
    if run.loss is not None:
        rows["lowest valid nll"] = f"{run.loss:.4f} nats per token"
    world: Mapping[str, Any] = run.info.get("world", {})
    if world:
        rows["processes"] = (
            f"{world.get('processes')} on {world.get('device')}, expert parallel {world.get('expert_parallel')}"
        )
    for name in ("commit", "host", "started", "seed"):
        if run.info.get(name) is not None:
            rows[name] = str(run.info[name])
    if run.overrides:
        rows["overrides"] = " ".join(run.overrides)
    return _table((), [[name, f"<code>{for_html(value)}</code>"] for name, value in rows.items()], text=True)


def _loads(train: Sequence[Mapping[str, Any]]) -> list[str]:
    layers = sorted({layer for line in train for layer in line.get("load", {})}, key=lambda name: (len(name), name))
    drawn = [(layer, figures.load_map(train, layer)) for layer in layers]
    return [f"<h3>sparse layer {for_html(layer)}</h3>\n{svg}" for layer, svg in drawn if svg]


def _scores(results: Results) -> str:
    header = (
        "direction",
        "tier",
        "lines",
        "BLEU",
        "chrF++",
        *(f"{b} {m}" for b in BASELINES for m in ("BLEU", "chrF++")),
    )
    rows = []
    for direction, result in results.directions.items():
        scores = [result.scores, *(result.baselines[name] for name in BASELINES)]
        cells = [f"{value:.1f}" for entry in scores for value in (entry.bleu, entry.chrf)]
        rows.append([for_html(direction), for_html(tier_of(direction, results.tiers)), f"{result.sentences:,}", *cells])
    for group, members in results.groups.items():
        scores = [results.average(members), *(results.average(members, name) for name in BASELINES)]
        cells = [f"<b>{value:.1f}</b>" for entry in scores for value in (entry.bleu, entry.chrf)]
        rows.append([f"<b>{for_html('average' if group == 'all' else group)}</b>", "", str(len(members)), *cells])
    signatures = [*results.signatures["bleu"].values(), results.signatures["chrf"]]
    small = "".join(f"<li><code>{for_html(line)}</code></li>" for line in [*signatures, *results.notes])
    return f"{_table(header, rows)}\n<ul>{small}</ul>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """An HTML table; cells are HTML, headings are text."""
    head = f"<tr>{''.join(f'<th>{for_html(name)}</th>' for name in header)}</tr>\n" if header else ""
    cell = '<td class="text">' if text else "<td>"
    body = "\n".join(f"<tr>{''.join(f'{cell}{value}</td>' for value in row)}</tr>" for row in rows)
    return f"<table>\n{head}{body}\n</table>"
