"""Prints the summary of a prepared data folder."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from moe_train.data.folder import DataFolder
from moe_train.data.text.languages import is_english
from moe_train.data.text.pairs import SPLITS, parse_sides

_MAX_LINES = 8  # on overlap


def print_summary(folder: DataFolder, console: Console) -> None:
    """Prints numbers of pairs or lines by split and tier, of those dropped by cleaning, and overlap with training."""
    console.print(_table(folder))
    manifest = folder.manifest
    console.print(
        f"{folder.path}: {len(folder.languages)} languages, {len(folder.directions)} directions, "
        f"vocabulary {manifest.vocabulary}",
        highlight=False,
        soft_wrap=True,
    )
    for line in (*_dropped(folder), *_overlap(folder)):
        console.print(line, highlight=False, soft_wrap=True)


def _table(folder: DataFolder) -> Table:
    table = Table("pair" if folder.directions else "language", *SPLITS, "tier", box=None, header_style="bold")
    for column in table.columns[1:4]:
        column.justify = "right"
    counts = folder.manifest.counts
    for pair in sorted({name for split in counts.values() for name in split}):
        sides = tuple(parse_sides(pair))
        languages = [language for language in sides if not is_english(language) or len(sides) == 1]
        tiers = sorted({folder.tiers[language] for language in languages if language in folder.tiers})
        cells = [f"{counts[split][pair]:,}" if pair in counts[split] else "-" for split in SPLITS]
        table.add_row(pair, *cells, "/".join(tiers))
    return table


def _dropped(folder: DataFolder) -> list[str]:
    total: Counter[str] = Counter()
    unit = "pairs" if folder.directions else "lines"
    for counts in folder.manifest.cleaning.values():
        total.update(counts)
    dropped = {rule.removeprefix("dropped_"): n for rule, n in total.items() if rule.startswith("dropped_") and n}
    if not dropped:
        return []
    rules = ", ".join(f"{rule.replace('_', ' ')} {n:,}" for rule, n in sorted(dropped.items(), key=lambda kv: -kv[1]))
    return [f"dropped {sum(dropped.values()):,} of {total['read']:,} training {unit}: {rules}"]


def _overlap(folder: DataFolder) -> list[str]:
    lines = []
    for split, pairs in folder.manifest.overlap.items():
        for pair, counts in pairs.items():
            shared = [f"{n} {language}" for language, n in counts.items() if language != "sentences" and n]
            if shared:
                lines.append(
                    f"overlap: of the {counts['sentences']} {parse_sides(pair).unit} of {split} {pair}, training text "
                    f"contains {' and '.join(shared)} sentences (corpus.decontaminate=true removes them from training)"
                )
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"overlap: {len(lines) - _MAX_LINES} more sets, see manifest.json"]
    return lines
