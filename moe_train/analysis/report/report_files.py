"""Writes the leaderboard as CSV, with unrounded numbers, and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from moe_train.analysis.report.compare import Comparisons
from moe_train.analysis.report.leaderboard import (
    COLUMNS,
    RIGHT,
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
from moe_train.safe_text import for_csv, for_markdown


def to_csv(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    """A row per run with unrounded numbers; empty cells for missing ones."""
    groups = present_groups(runs)
    header = ["run", "path", "strategy", "overrides", "status", "cause", "updates", "parameters", "active_parameters"]
    header += ["flops_per_token", "training_flops_per_token", "words_per_second", "images_per_second"]
    header += ["valid_nll_loss", "baseline"]
    header += [*(name.replace(" ", "_") for name in SETS[1:]), "problems"]
    for group in groups:
        name = group.replace(" ", "_")
        header += [f"{name}_{column}" for column in ("bleu", "chrf", "better", "worse", "compared")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for run in ranked(runs):
        row: list[object] = [
            run.name,
            run.path,
            run.strategy,
            " ".join(run.overrides),
            run.status,
            run.cause,
            run.update,
        ]
        row += [run.parameters, run.active_parameters, run.flops_per_token, run.training_flops_per_token]
        row += [run.words_per_second, run.images_per_second, run.loss]
        row.append(comparisons.baseline)
        found = set_cells(run)
        row += [*(found.get(name) for name in SETS[1:]), "; ".join(run.problems)]
        for group in groups:
            row += _csv_group(run, group, comparisons)
        writer.writerow(["" if value is None else for_csv(value) for value in row])
    return stream.getvalue()


def _csv_group(run: RunReport, group: str, comparisons: Comparisons) -> list[object]:
    members = run.results.groups.get(group) if run.results else None
    if run.results is None or not members:
        return [None] * 5
    scores, count = run.results.average(members), comparisons.count(run.name, members)
    counts = [count.better, count.worse, count.directions] if count else [None] * 3
    return [scores.bleu, scores.chrf, *counts]


def directions_csv(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    """A row per run and direction, with differences to the baseline and p values."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["run", "direction", "bleu", "chrf", "baseline", "bleu_difference", "bleu_p", "chrf_difference", "chrf_p"]
    )
    for run in ranked(runs):
        for direction, result in run.results.directions.items() if run.results else ():
            row: list[object] = [run.name, direction, result.scores.bleu, result.scores.chrf, comparisons.baseline]
            found = comparisons.by_run.get(run.name, {}).get(direction)
            if found is not None:
                row += [found.difference.bleu, f"{found.bleu_p:.4g}", found.difference.chrf, f"{found.chrf_p:.4g}"]
            writer.writerow(map(for_csv, [*row, *[""] * (9 - len(row))]))
    return stream.getvalue()


def to_markdown(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    """All tables, failures and the explanation."""
    distinct = settings(runs)
    unused = [*unused_speeds(runs), *([] if any(distinct.values()) else ["settings"])]
    columns = [name for name in COLUMNS if name not in unused]
    table = [[run_cells(run, distinct[run.name])[name] for name in columns] for run in ranked(runs)]
    parts = ["# Leaderboard", "", *_markdown(columns, table)]
    rows = []
    for group in present_groups(runs):
        for run in ranked(runs):
            scores = score_cells(run, group, comparisons)
            if scores[0] != "-":
                rows.append(["average" if group == "all" else group, run.name, run.strategy, *scores])
    if rows:
        parts += ["", *_markdown(("directions", "run", "strategy", "BLEU", "chrF++", "against baseline"), rows)]
    if scored := [found for run in ranked(runs) if (found := set_cells(run))]:
        parts += ["", *_markdown(SETS, [[found[name] for name in SETS] for found in scored])]
    for line in (*failures(runs), *damages(runs), *explanation(comparisons)):
        parts += ["", for_markdown(line)]
    return "\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---:" if name in RIGHT else "---" for name in header]
    cells = ([*map(for_markdown, header)], rule, *([*map(for_markdown, row)] for row in rows))
    return [f"| {' | '.join(row)} |" for row in cells]
