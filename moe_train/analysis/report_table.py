"""The leaderboard: on the screen, as CSV, as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence

from rich import box
from rich.table import Table

from moe_train.analysis.report_compare import Comparisons
from moe_train.analysis.report_runs import RunReport
from moe_train.evaluation.averages import TIERS

GROUPS = ("all", "from English", "into English", "between others", *(f"{tier} resource" for tier in TIERS))
_COSTS = ("run", "strategy", "status", "updates", "params", "active", "FLOPs/tok", "words/s", "loss")
_RIGHT = ("updates", "params", "active", "FLOPs/tok", "words/s", "loss", "BLEU", "chrF++")


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


def cost_cells(run: RunReport, common: Collection[str] = ()) -> list[str]:
    """A row of the first table: what it is, and what it costs.

    Args:
        common: words of the command line that every run has; they tell none from the others.
    """
    strategy = " ".join([run.strategy or "?", *(_short(w) for w in run.overrides if _tells(w) and w not in common)])
    return [
        run.name,
        strategy,
        run.status,
        f"{run.update:,}",
        _amount(run.parameters),
        _amount(run.active_parameters),
        _amount(run.flops_per_token),
        "-" if run.words_per_second is None else f"{run.words_per_second:,.0f}",
        "-" if run.loss is None else f"{run.loss:.4f}",
    ]


def common_words(runs: Sequence[RunReport]) -> set[str]:
    """The words of the command line that all of several runs have."""
    return set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()


def _short(override: str) -> str:
    """``num_experts=8`` for ``routing.num_experts=8``: leaderboard.csv has the whole key."""
    key, is_set, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{is_set}{value}"


def _tells(override: str) -> bool:
    """Whether an override helps to tell runs apart; the strategy has a place of its own."""
    return not override.startswith(("routing=", "data=", "hydra", "launch"))


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


def cost_table(runs: Sequence[RunReport]) -> Table:
    """Runs and what they cost."""
    table = _table([name.replace("/", "\n/") for name in _COSTS])
    for run in ranked(runs):
        table.add_row(*cost_cells(run, common_words(runs)), style="dim" if run.failed else None)
    return table


def score_table(runs: Sequence[RunReport], comparisons: Comparisons) -> Table:
    """A row per run and group of directions."""
    table = _table(("directions", "run", "strategy", "BLEU", "chrF++", "against baseline"))
    for group in present_groups(runs):
        for run in ranked(runs):
            cells = score_cells(run, group, comparisons)
            if cells[0] != "-":
                table.add_row("average" if group == "all" else group, run.name, run.strategy, *cells)
        table.add_section()
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        right = name.replace("\n", "") in _RIGHT
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def failures(runs: Sequence[RunReport]) -> list[str]:
    """A line per failed run: its name and the cause."""
    return [f"{run.name} failed at update {run.update}: {run.cause}" for run in runs if run.failed]


def explanation(comparisons: Comparisons) -> list[str]:
    """What the marks mean, and what was not compared."""
    if not comparisons.baseline:
        return list(comparisons.notes)
    meaning = (
        f"against baseline ({comparisons.baseline}): directions in which BLEU is better (+) or worse (-), out of those "
        f"compared (/); paired bootstrap, {comparisons.samples} samples, p < {comparisons.significance:g} per direction"
    )
    return [meaning, *comparisons.notes]


def to_csv(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    """A row per run, numbers unrounded; empty where there is none."""
    groups = present_groups(runs)
    header = ["run", "path", "strategy", "overrides", "status", "cause", "updates", "parameters", "active_parameters"]
    header += ["flops_per_token", "words_per_second", "valid_nll_loss", "baseline"]
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
        row += [run.parameters, run.active_parameters, run.flops_per_token, run.words_per_second, run.loss]
        row.append(comparisons.baseline)
        for group in groups:
            row += _csv_group(run, group, comparisons)
        writer.writerow(["" if value is None else value for value in row])
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
            writer.writerow([*row, *[""] * (9 - len(row))])
    return stream.getvalue()


def to_markdown(runs: Sequence[RunReport], comparisons: Comparisons) -> str:
    """Both tables, failures and the explanation."""
    parts = ["# Leaderboard", "", *_markdown(_COSTS, [cost_cells(run, common_words(runs)) for run in ranked(runs)])]
    rows = []
    for group in present_groups(runs):
        for run in ranked(runs):
            cells = score_cells(run, group, comparisons)
            if cells[0] != "-":
                rows.append(["average" if group == "all" else group, run.name, run.strategy, *cells])
    if rows:
        parts += ["", *_markdown(("directions", "run", "strategy", "BLEU", "chrF++", "against baseline"), rows)]
    for line in (*failures(runs), *explanation(comparisons)):
        parts += ["", _escaped(line)]
    return "\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---:" if name in _RIGHT else "---" for name in header]
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (header, rule, *rows)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
