"""Log-probabilities of given translations of a held-out split, by sentence and token (``moe-evaluate mode=score``)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.text.lines import read_lines, sha256
from moe_train.errors import DataError
from moe_train.evaluation.evaluate_split import (
    Destination,
    choose_directions,
    decode_timed,
    default_directions,
    find_destination,
    settings_of,
)
from moe_train.evaluation.hypothesis_files import write_lines
from moe_train.evaluation.inference.output_lines import hypothesis_values
from moe_train.evaluation.loading import OpenedRun, open_run
from moe_train.evaluation.long_lines import cut_note
from moe_train.evaluation.result_files import part_name, writing
from moe_train.evaluation.translations import Translation
from moe_train.evaluation.translator import EncodedLines, encode
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.checkpoint.store import run_on_all_ranks
from moe_train.training.run.run_info import versions
from moe_train.training.runtime.world import World
from moe_train.utils.regular_files import read_regular

FOLDER = "scored"  # in the folder of results


@dataclass(frozen=True)
class _Pairs:
    """Sources and given translations of one direction, encoded."""

    direction: str
    translations: list[str]
    encoded: EncodedLines
    digest: str  # of the file of hypotheses; "" for references


def score_split(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Scores the references of a split, or the hypotheses of a folder. Writes files named as those of an evaluation to
    the folder ``scored`` of the results: sums by direction, and a JSON line for each sentence.

    Args:
        console: for progress and the place of the results; None: nothing is shown.

    Returns:
        The content of the scores file.

    Raises:
        ConfigError, DataError, CheckpointError, LaunchError: as :func:`moe_train.evaluation.evaluate_split.evaluate`;
            also hypotheses that are missing or not aligned with the split.
    """
    world = World.current()
    run = open_run(config.run, config.checkpoint, config.data, config.inference, world, config.data_verify)
    chosen = choose_directions(run, config.split, config.directions)
    named = [] if chosen == default_directions(run, config.split) else chosen
    part = part_name(named, config.max_sentences)
    destination = run_on_all_ranks(world, lambda: _destination(run, config, part, console) if world.main else None)
    held = [_encode(run, config, name) for name in chosen]
    outcomes, seconds = decode_timed(run, config, [entry.encoded for entry in held], console, "scoring")
    rest = iter(outcomes)
    scored = {entry.direction: entry.encoded.to_lines([next(rest) for _ in entry.encoded.batches]) for entry in held}
    content = {
        "mode": "score",
        "settings": _settings(run, config, held),
        **_summary(scored),
        "seconds": round(seconds, 3),
        "notes": _notes(run, held),
        "command": sys.argv,
        "versions": versions(),
    }
    run_on_all_ranks(world, lambda: _write(destination, content, held, scored) if destination else None)
    if destination is not None and console is not None:
        console.print(f"written: {destination.files.scores}", highlight=False, markup=False, soft_wrap=True)
    return content


def _destination(run: OpenedRun, config: EvaluateConfig, part: str, console: Console | None) -> Destination:
    found = find_destination(run, config, part, console)
    files = replace(found.files, folder=found.files.folder / FOLDER)
    with writing(found.files.folder):
        files.folder.mkdir(exist_ok=True)
    return replace(found, files=files)


def _encode(run: OpenedRun, config: EvaluateConfig, direction: str) -> _Pairs:
    source, target = direction.split("-")
    sources, translations = run.data.raw(config.split, direction)
    digest = ""
    if config.hypotheses is not None:
        path = Path(config.hypotheses) / f"{config.split}.{direction}.{target}"
        if not path.is_file():
            raise DataError("there are no hypotheses of that direction", str(path), "choose directions=[…] or a folder")
        translations, digest = list(read_lines(path, nul=True)), sha256(path)
    if config.max_sentences:
        sources, translations = sources[: config.max_sentences], translations[: config.max_sentences]
    if len(translations) != len(sources):
        what = f"{len(translations)} hypotheses for {len(sources)} sentences"
        raise DataError(what, f"{config.hypotheses}, {direction}", "give one line for each sentence of the split")
    task = run.translating_task
    targets = [task.folder.tokenizer().encode(line) for line in translations]
    encoded = encode(task, sources, source, target, config.search.batch_tokens, targets=targets)
    return _Pairs(direction, translations, encoded, digest)


def _settings(run: OpenedRun, config: EvaluateConfig, held: Sequence[_Pairs]) -> dict[str, Any]:
    """The settings that determine the scores."""
    settings = settings_of(run, config)
    del settings["search"], settings["seed"]
    return {**settings, "hypotheses": {entry.direction: entry.digest for entry in held if entry.digest}}


def _summary(scored: Mapping[str, Sequence[Translation]]) -> dict[str, Any]:
    """Sums by direction, and the mean over directions of the log-probability per token."""
    directions = {}
    for name, lines in scored.items():
        total, tokens = math.fsum(line.score for line in lines), sum(line.tokens for line in lines)
        directions[name] = {
            "sentences": len(lines),
            "tokens": tokens,
            "score": round(total, 4),
            **_mean(total / tokens),
        }
    average = math.fsum(entry["score_per_token"] for entry in directions.values()) / len(directions)
    return {"directions": directions, "average": _mean(average)}


def _mean(log_probability: float) -> dict[str, float]:
    return {"score_per_token": round(log_probability, 6), "perplexity": round(math.exp(min(-log_probability, 700)), 4)}


def _notes(run: OpenedRun, held: Sequence[_Pairs]) -> list[str]:
    notes = []
    for entry in held:
        if entry.encoded.truncated:
            lines = [line + 1 for line in entry.encoded.truncated]
            note = cut_note(lines, run.translating_task.max_positions()[0])
            notes.append(f"{entry.direction}, sources or translations, {note}")
        if entry.direction not in run.trained:
            notes.append(f"{entry.direction}: not trained in this run (zero-shot)")
    return notes


def _write(
    destination: Destination, content: dict[str, Any], held: Sequence[_Pairs], scored: Mapping[str, list[Translation]]
) -> None:
    """Writes the files; adds to the notes of ``content``. Rank 0 calls it."""
    files = destination.files
    with writing(files.folder):
        content["notes"] += [destination.note] if destination.note else []
        if files.scores.exists() and _recorded_settings(files.scores) != json.loads(json.dumps(content["settings"])):
            content["notes"].append(files.keep_earlier())
        for entry in held:
            lines = enumerate(zip(entry.translations, scored[entry.direction], strict=True), 1)
            rows = [
                {"line": number, "cut": found.cut, **hypothesis_values(found), "text": text}
                for number, (text, found) in lines
            ]
            path = files.outputs(entry.direction).scored
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows])
        replace_text(files.scores, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _recorded_settings(path: Path) -> Any:
    """None where they cannot be read."""
    try:
        return json.loads(read_regular(path))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def print_sums(content: Mapping[str, Any], console: Console) -> None:
    """Prints a row per direction."""
    settings = content["settings"]
    what = "hypotheses" if settings["hypotheses"] else "references"
    some = f", the first {settings['max_sentences']:,} of each direction" if settings["max_sentences"] else ""
    table = Table(title=f"{what} of {settings['split']}, {settings['checkpoint']}{some}: log-probabilities (nats)")
    for column in ("direction", "sentences", "tokens", "per token", "perplexity"):
        table.add_column(column, justify="left" if column == "direction" else "right")
    for name, entry in content["directions"].items():
        table.add_row(name, f"{entry['sentences']:,}", f"{entry['tokens']:,}", *_cells(entry))
    table.add_row("average", "", "", *_cells(content["average"]), style="bold")
    console.print(table)
    for note in content["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _cells(entry: Mapping[str, float]) -> tuple[str, str]:
    return f"{entry['score_per_token']:.4f}", f"{entry['perplexity']:.2f}"
