"""Prints the table of scores of moe-evaluate."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_train.evaluation.scoring.averages import tier_of
from moe_train.evaluation.scoring.bleu_chrf import CorpusScores
from moe_train.evaluation.scoring.examples import example_text
from moe_train.evaluation.scoring.results import BASELINES, Results


def limit(results: Results) -> str:
    """The limit on lines per direction, for a heading; "" where there was none."""
    sentences = results.settings.get("max_sentences")
    return f", the first {sentences:,} lines of each direction" if sentences else ""


def score_table(results: Results) -> Table:
    """A row per direction and per group of directions, with the scores of the model and of both baselines."""
    title = (
        f"{results.settings['split']}, {results.settings['checkpoint']}{limit(results)} "
        "(copy: the source as the output; shuffled: the model's outputs permuted between sentences)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("direction", no_wrap=True)
    table.add_column("tier")
    table.add_column("lines", justify="right")
    for heading in ("BLEU", "chrF++"):
        table.add_column(heading, justify="right", style="bold", no_wrap=True)
    for name in BASELINES:
        for heading in ("BLEU", "chrF++"):
            table.add_column(f"{name}\n{heading}", justify="right", style="dim", no_wrap=True)
    for name in results.metrics:
        table.add_column(name, justify="right", no_wrap=True)
    for direction, result in results.directions.items():
        scores = [result.scores, *(result.baselines[name] for name in BASELINES)]
        tier = tier_of(direction, results.tiers)
        further = [further_cell(result.metrics, name) for name in results.metrics]
        name = f"{direction} (zero-shot)" if result.zero_shot else direction
        table.add_row(name, tier, f"{result.sentences:,}", *_cells(scores), *further)
    table.add_section()
    for group, members in results.groups.items():
        scores = [results.average(members), *(results.average(members, name) for name in BASELINES)]
        sentences = sum(results.directions[d].sentences for d in members)
        label = "average" if group == "all" else group
        further = [further_cell(results.average_metrics(members), name) for name in results.metrics]
        table.add_row(f"{label} ({len(members)})", "", f"{sentences:,}", *_cells(scores), *further)
    return table


def further_cell(scores: Mapping[str, float], name: str) -> str:
    """A further metric's score as text."""
    return f"{scores[name]:.4g}" if name in scores else "-"


def _cells(scores: list[CorpusScores]) -> list[str]:
    return [f"{value:.1f}" for entry in scores for value in (entry.bleu, entry.chrf)]


def score_summary(results: Results) -> Group:
    """The table, sacrebleu's signatures, notes, the speed of decoding, and examples."""
    width = max(len(name) for name, _ in results.signature_lines)
    signatures = [f"{name:{width}}  {signature}" for name, signature in results.signature_lines]
    speed = results.decoding
    lines = [
        *signatures,
        *(f"note    {note}" for note in results.notes),
        f"decoded {speed['sentences']:,} sentences, {speed['words_per_second']:,.0f} words/s "
        f"({speed['tokens_per_second']:,.0f} tokens/s), {speed['processes']} process(es)",
    ]
    examples = [Text(), example_text(results.examples)] if results.examples else []
    return Group(score_table(results), Text("\n".join(lines)), *examples)


def print_scores(results: Results, console: Console) -> None:
    """Prints :func:`score_summary`."""
    console.print(score_summary(results), soft_wrap=True)
