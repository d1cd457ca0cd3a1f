"""The leaderboard: content of its cells, and its tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from moe_train.analysis.report.compare import Comparisons
from moe_train.analysis.report.load_runs import RunReport
from moe_train.analysis.report.sentence_sets import SETS, set_cells
from moe_train.analysis.report.settings import settings
from moe_train.evaluation.scoring.averages import TIERS
from moe_train.safe_text import for_terminal

GROUPS = ("all", "from English", "into English", "between others", *(f"{tier} resource" for tier in TIERS))
SPEEDS = ("words/s", "images/s")
_RESULTS = ("run", "strategy", "status", "updates", *SPEEDS, "valid nll")
_COSTS = ("run", "strategy", "params", "active", "FLOPs/tok forward", "FLOPs/tok training")
_SETTINGS = ("run", "settings")
_NAME = 20  # width of a run's name, in characters
COLUMNS = (*_RESULTS[:2], "settings", *_RESULTS[2:], *_COSTS[2:])
RIGHT = (*_RESULTS[3:], *_COSTS[2:], "BLEU", "chrF++", "lines")


def ranked(runs: Sequence[RunReport]) -> list[RunReport]:
    """Best first: by average chrF++, then by validation loss; failed runs last."""

    def key(run: RunReport) -> tuple[bool, float, float, str]:
        chrf = run.results.average().chrf if run.results else -1.0
        return run.failed, -chrf, run.loss if run.loss is not None else float("inf"), run.name

    return sorted(runs, key=key)


def present_groups(runs: Sequence[RunReport]) -> list[str]:
    """The groups of directions that any run has scores for."""
    present = {name for run in runs if run.results for name in run.results.groups}
    return [name for name in GROUPS if name in present]


def run_cells(run: RunReport, distinct: Sequence[str] = ()) -> dict[str, str]:
    """Cells of a run by name of the column: strategy, progress and cost.

    Args:
        distinct: its settings that other runs do not have.
    """
    return {
        "run": run.name,
        "strategy": run.strategy or "?",
        "settings": " ".join(distinct),
        "status": run.status,
        "updates": f"{run.update:,}",
        **{name: "-" if speed is None else f"{speed:,.0f}" for name, speed in _speeds(run).items()},
        "valid nll": "-" if run.loss is None else f"{run.loss:.4f}",
        "params": _amount(run.parameters),
        "active": _amount(run.active_parameters),
        "FLOPs/tok forward": _amount(run.flops_per_token),
        "FLOPs/tok training": _amount(run.training_flops_per_token),
    }


def _speeds(run: RunReport) -> dict[str, float | None]:
    return dict(zip(SPEEDS, (run.words_per_second, run.images_per_second), strict=True))


def unused_speeds(runs: Sequence[RunReport]) -> list[str]:
    """The columns of :data:`SPEEDS` that no run has; words/s is kept where no run has a speed."""
    unused = [name for name in SPEEDS if all(_speeds(run)[name] is None for run in runs)]
    return unused if len(unused) < len(SPEEDS) else list(SPEEDS[1:])


def _amount(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.0f}"


def score_cells(run: RunReport, group: str, comparisons: Comparisons) -> tuple[str, str, str]:
    """BLEU, chrF++ and the comparison with the baseline over a group: ``+3 -1 /8`` = better in 3 of 8, worse in 1."""
    members = run.results.groups.get(group) if run.results else None
    if run.results is None or not members:
        return "-", "-", ""
    scores = run.results.average(members)
    count = comparisons.count(run.name, members)
    against = "baseline" if run.name == comparisons.baseline else ""
    if count is not None:
        against = f"+{count.better} -{count.worse} /{count.directions}"
    return f"{scores.bleu:.2f}", f"{scores.chrf:.2f}", against


def run_tables(runs: Sequence[RunReport]) -> list[Table]:
    """Tables of 80 columns: results, costs, and the settings in which runs differ."""
    distinct = settings(runs)
    unused = unused_speeds(runs)
    results = tuple(name for name in _RESULTS if name not in unused)
    tables = {columns: _table(columns) for columns in (results, _COSTS, _SETTINGS)}
    for run in ranked(runs):
        found = {**run_cells(run, distinct[run.name]), "run": _folded(run.name)}
        for columns, table in tables.items():
            if columns != _SETTINGS or distinct[run.name]:
                table.add_row(*_cells([found[name] for name in columns]), style="dim" if run.failed else None)
    return [table for table in tables.values() if table.row_count]


def group_score_table(runs: Sequence[RunReport], comparisons: Comparisons) -> Table:
    """A row per run and group of directions."""
    table = _table(("directions", "run", "strategy", "BLEU", "chrF++", "against baseline"))
    for group in present_groups(runs):
        for run in ranked(runs):
            found = score_cells(run, group, comparisons)
            if found[0] != "-":
                named = "average" if group == "all" else group, _folded(run.name), run.strategy
                table.add_row(*_cells([*named, *found]))
        table.add_section()
    return table


def set_table(runs: Sequence[RunReport]) -> Table:
    """The set of sentences on which each run was scored."""
    table = _table(SETS)
    for run in ranked(runs):
        if found := set_cells(run):
            table.add_row(*_cells([{**found, "run": _folded(run.name)}[name] for name in SETS]))
    return table


def _table(columns: Sequence[str]) -> Table:
    """Each word of a heading is on its own line; only some columns wrap their cells."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        wraps = name in ("run", "settings", "tokenizers")
        side: JustifyMethod = "right" if name in RIGHT else "left"
        table.add_column(name.replace(" ", "\n"), justify=side, overflow="fold", no_wrap=not wraps)
    return table


def _cells(texts: Sequence[str]) -> list[Text]:
    """Cells as plain text: rich would read ``[en-de]`` as a style."""
    return [Text(for_terminal(text)) for text in texts]


def _folded(name: str) -> str:
    """A long name in lines that break after a separator, such as a slash."""
    lines = [""]
    for part in re.findall(r"[^/,_-]*[/,_-]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def failures(runs: Sequence[RunReport]) -> list[str]:
    """One line per failed run: its name and the cause."""
    return [f"{run.name} failed at update {run.update}: {run.cause}" for run in runs if run.failed]


def damages(runs: Sequence[RunReport]) -> list[str]:
    """One line per file of a run folder that could not be read."""
    return [f"{run.name}: {problem}" for run in runs for problem in run.problems]


def explanation(comparisons: Comparisons) -> list[str]:
    """Explains the comparison with the baseline, and what was not compared."""
    if not comparisons.baseline:
        return list(comparisons.notes)
    meaning = (
        f"against baseline ({comparisons.baseline}): directions in which BLEU is better (+) or worse (-), out of those "
        f"compared (/); paired bootstrap, {comparisons.samples} samples, p < {comparisons.significance:g} per direction"
    )
    return [meaning, *comparisons.notes]
