"""Writes the report page: one HTML file with Plotly inside, which loads nothing and needs no network."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.analysis.report.compare import Comparisons
from moe_train.analysis.report.leaderboard import (
    COLUMNS,
    damages,
    explanation,
    failures,
    present_groups,
    ranked,
    run_cells,
    score_cells,
    unused_speeds,
)
from moe_train.analysis.report.load_runs import RunReport
from moe_train.analysis.report.sentence_sets import SETS, set_cells
from moe_train.analysis.report.settings import settings
from moe_train.errors import MissingDependency
from moe_train.safe_text import for_html

_ASSETS = Path(__file__).parent / "assets"
# Nothing may be loaded, whatever a run folder contains; Plotly writes styles into elements.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_RIGHT = ("updates", "words/s", "images/s", "valid nll", "params", "active", "FLOPs/tok forward", "FLOPs/tok training")


def report_page(runs: Sequence[RunReport], comparisons: Comparisons, data: Mapping[str, Any]) -> str:
    """The page of a report; ``data``: :func:`moe_train.analysis.report.page_data.page_data`.

    Raises:
        MissingDependency: plotly is not installed.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [_leaderboard(runs, comparisons), *_group_scores(runs, comparisons), *_sets(runs)]
    messages = [f'<p class="failed">{for_html(line)}</p>' for line in (*failures(runs), *damages(runs))]
    messages += [f'<p class="note">{for_html(line)}</p>' for line in explanation(comparisons)]
    tables = page_section("leaderboard", "Leaderboard", "\n".join([*parts, *messages]))
    return fill_page(f"moe-report · {title}", "report", tables, data)


def fill_page(title: str, name: str, tables: str, data: Mapping[str, Any]) -> str:
    """The page ``page.html`` with the script ``NAME.js``, which draws ``data``.

    Args:
        tables: HTML that is shown without scripts too.

    Raises:
        MissingDependency: plotly is not installed.
    """
    template = (_ASSETS / "page.html").read_text(encoding="utf-8")
    filling = {
        "TITLE": for_html(title),
        "POLICY": html.escape(_POLICY),
        "STYLE": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "TABLES": tables,
        "PLOTLY": _plotly(),
        "DATA": _json(data),
        "SCRIPT": "\n".join((_ASSETS / script).read_text(encoding="utf-8") for script in ("charts.js", f"{name}.js")),
    }
    head, *rest = template.split("{{")  # one pass: what is filled in is not searched
    pieces = [piece.split("}}", 1) for piece in rest]
    return head + "".join(filling[key] + text for key, text in pieces)


def page_section(name: str, title: str, content: str) -> str:
    """A section of a page; ``content`` is HTML."""
    return f'<section id="{name}">\n<h2>{for_html(title)}</h2>\n{content}\n</section>'


def _plotly() -> str:
    """Plotly's script, from the package ``plotly``, of which nothing is imported."""
    found = importlib.util.find_spec("plotly")
    path = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    if path is None or not path.is_file():
        raise MissingDependency(
            "the report page needs plotly", remedy="run scripts/setup.sh, pip install plotly, or set html=false"
        )
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table of text, in a box that scrolls sideways.

    Args:
        right: headings of columns of numbers.
    """
    sides = [' class="number"' if name in right else "" for name in header]
    head = "".join(f'<th scope="col"{side}>{for_html(name)}</th>' for name, side in zip(header, sides, strict=True))
    lines = []
    for row in rows:
        cells = [f"<td{side}>{for_html(cell)}</td>" for cell, side in zip(row, sides, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{''.join(lines)}</tbody>\n</table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _leaderboard(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    distinct = settings(runs)
    unused = [*unused_speeds(runs), *([] if any(distinct.values()) else ["settings"])]
    scored = any(run.results for run in runs)
    columns = [name for name in COLUMNS if name not in (*unused, "settings")]
    columns += [name for name in COLUMNS if name == "settings" and name not in unused]  # the longest is the last
    scores = ("BLEU", "chrF++", "against baseline") if scored else ()
    place = columns.index("status")
    rows = []
    for run in ranked(runs):
        cells = run_cells(run, distinct[run.name])
        found = score_cells(run, "all", comparisons) if scored else ()
        known = [cells[name] for name in columns]
        rows.append([*known[:place], *found, *known[place:]])
    header = [*columns[:place], *scores, *columns[place:]]
    return html_table(header, rows, (*_RIGHT, *scores[:2]))


def _group_scores(runs: Sequence[RunReport], comparisons: Comparisons) -> list[str]:
    rows = []
    for group in present_groups(runs):
        for run in ranked(runs):
            cells = score_cells(run, group, comparisons)
            if group != "all" and cells[0] != "-":
                rows.append([group, run.name, *cells])
    if not rows:
        return []
    table = html_table(("directions", "run", "BLEU", "chrF++", "against baseline"), rows, ("BLEU", "chrF++"))
    return [f"<details><summary>Scores by group of directions</summary>{table}</details>"]


def _sets(runs: Sequence[RunReport]) -> list[str]:
    rows = [[found[name] for name in SETS] for run in ranked(runs) if (found := set_cells(run))]
    table = html_table(SETS, rows, ("lines", "directions"))
    return [f"<details><summary>What the scores are of</summary>{table}</details>"] if rows else []
