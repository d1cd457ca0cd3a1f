"""Makes the report over runs: prints and writes the leaderboard, writes the page."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from moe_train.analysis.report.compare import Comparisons, choose_baseline, compare
from moe_train.analysis.report.leaderboard import (
    damages,
    explanation,
    failures,
    group_score_table,
    run_tables,
    set_table,
)
from moe_train.analysis.report.load_runs import RunReport, read_runs
from moe_train.analysis.report.page_data import page_data
from moe_train.analysis.report.report_files import directions_csv, to_csv, to_markdown
from moe_train.analysis.report.report_page import report_page
from moe_train.config.evaluation import ReportConfig
from moe_train.errors import ConfigError
from moe_train.training.checkpoint.checksums import replace_text, why_not_writable


def make_report(config: ReportConfig, console: Console) -> list[RunReport]:
    """Prints the leaderboard; writes ``leaderboard.csv``, ``leaderboard.md``, ``directions.csv`` and ``report.html``.

    Where their folder cannot be written, they are written below the working directory, with a note.

    Returns:
        The runs, in the order in which they were found.

    Raises:
        ConfigError: no runs, an unknown baseline, or no folder that can be written.
        MissingDependency: the page is wanted and plotly is not installed.
    """
    runs = read_runs(config.runs, config.split, config.part)
    baseline = choose_baseline(runs, config.baseline)
    comparisons = compare(runs, baseline, config.samples, config.significance)
    _print(runs, comparisons, console)
    out, notes = _leaderboard_folder(config, runs)
    written = [out / "leaderboard.csv", out / "leaderboard.md", out / "directions.csv"]
    texts = to_csv(runs, comparisons), to_markdown(runs, comparisons), directions_csv(runs, comparisons)
    for path, text in zip(written, texts, strict=True):
        _write(path, text)
    if config.html:
        written.append(out / "report.html")
        _write(written[-1], report_page(runs, comparisons, page_data(runs, comparisons, config.sentences)))
    for line in (*(f"note: {note}" for note in notes), *(f"written: {path}" for path in written)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return runs


def _leaderboard_folder(config: ReportConfig, runs: list[RunReport]) -> tuple[Path, list[str]]:
    expected = Path(config.out) if config.out else runs[0].path
    if not config.out and len(runs) > 1:
        expected = Path(os.path.commonpath([run.path.parent for run in runs]))
    reason = why_not_writable(expected)
    if not reason:
        return expected, []
    fallback = Path.cwd() / "report"
    if config.out or why_not_writable(fallback):
        raise ConfigError(f"the leaderboard cannot be written ({reason})", str(expected), "set another folder: out=…")
    return fallback, [f"{expected} cannot be written ({reason}): the leaderboard is in {fallback}"]


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:  # such as a full disk
        raise ConfigError(
            f"the report cannot be written ({error.strerror or error})", str(path), "set another folder: out=…"
        ) from error


def _print(runs: list[RunReport], comparisons: Comparisons, console: Console) -> None:
    for table in run_tables(runs):
        console.print(table)
    if any(run.results for run in runs):
        console.print(group_score_table(runs, comparisons))
        console.print(set_table(runs))
    for line in (*failures(runs), *damages(runs)):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    for line in explanation(comparisons):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
