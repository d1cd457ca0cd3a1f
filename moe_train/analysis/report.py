"""The report over runs: leaderboard on the screen and on disk, a page for each run."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from moe_train.analysis.report_compare import Comparisons, choose_baseline, compare
from moe_train.analysis.report_files import directions_csv, to_csv, to_markdown
from moe_train.analysis.report_page import run_page
from moe_train.analysis.report_runs import RunReport, read_runs
from moe_train.analysis.report_table import explanation, failures, run_tables, score_table
from moe_train.config.evaluation import ReportConfig
from moe_train.training.integrity import replace_text


def make_report(config: ReportConfig, console: Console) -> list[RunReport]:
    """Prints the leaderboard, writes ``leaderboard.csv``, ``leaderboard.md`` and ``directions.csv``, and into every run
    folder ``report.html``.

    Returns:
        The runs, in the order in which they were found.

    Raises:
        ConfigError: no runs, or no such baseline.
        MissingDependency: pages are wanted and matplotlib is not installed.
    """
    runs = read_runs(config.runs, config.split)
    baseline = choose_baseline(runs, config.baseline)
    comparisons = compare(runs, baseline, config.split, config.samples, config.significance)
    _print(runs, comparisons, console)
    out = Path(config.out) if config.out else _common(runs)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "leaderboard.csv", to_csv(runs, comparisons))
    replace_text(out / "leaderboard.md", to_markdown(runs, comparisons))
    replace_text(out / "directions.csv", directions_csv(runs, comparisons))
    written = [out / "leaderboard.csv", out / "leaderboard.md", out / "directions.csv"]
    if config.html:
        for run in runs:
            replace_text(run.path / "report.html", run_page(run))
        written.append(Path("report.html in every run folder"))
    console.print("\n".join(f"written: {path}" for path in written), highlight=False, markup=False, soft_wrap=True)
    return runs


def _common(runs: list[RunReport]) -> Path:
    """The folder that all runs stand in; of one run, its own."""
    return runs[0].path if len(runs) == 1 else Path(os.path.commonpath([run.path.parent for run in runs]))


def _print(runs: list[RunReport], comparisons: Comparisons, console: Console) -> None:
    for table in run_tables(runs):
        console.print(table)
    if any(run.results for run in runs):
        console.print(score_table(runs, comparisons))
    for line in failures(runs):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    for line in explanation(comparisons):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
