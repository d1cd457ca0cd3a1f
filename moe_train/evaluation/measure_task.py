"""Evaluates a held-out split for tasks that do not translate: losses, perplexities, accuracy, F1, and routing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_train.config.evaluation import EvaluateConfig
from moe_train.data.batching import Indices
from moe_train.data.text.lines import sha256
from moe_train.evaluation.loading import LoadedRun, choose_device, load_run
from moe_train.evaluation.result_files import ResultFiles, part_name, writable_folder, writing
from moe_train.evaluation.routed_tokens import describe_routed
from moe_train.tasks.metric_registry import shown_metrics
from moe_train.training.checkpoint.checksums import MANIFEST, replace_text
from moe_train.training.data_loader import move
from moe_train.training.metrics.log_lines import MetricSums, total
from moe_train.training.run.run_info import versions
from moe_train.utils.regular_files import read_regular

_SETTINGS = ("checkpoint_digest", "data_fingerprint", "max_sentences", "routing", "draw_seed")


def evaluate_task(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the model over every set of a split; writes the scores file of
    :class:`~moe_train.evaluation.result_files.ResultFiles`; ``<split>.json`` is written only for the whole split.

    Returns:
        The file's content: ``sets`` (name → measures), ``summary`` (computed by the task), ``routing`` (name → load of
        each expert, drops and entropy by layer; with strata, the shares of tokens by requested passes, with slots the
        largest weights), ``items``, ``seconds``, ``zero_shot`` (sets without training data, not in ``average``).

    Raises:
        ConfigError, DataError, CheckpointError: as :func:`load_run`; an unknown split, or results that cannot be
            written.
    """
    device = choose_device(config.launch.device)
    run = load_run(config.run, config.checkpoint, config.data, device, config.inference, config.data_verify)
    folder, note = writable_folder(run.folder.path, run.variant, config.out)
    files = ResultFiles(folder, config.split, part_name(max_sentences=config.max_sentences))
    sets = run.task.evaluation_sets(config.split, config.max_sentences)
    start = time.perf_counter()
    sums = {name: _measure_set(run, config.split, name, batches, device) for name, batches in sets.items()}
    seconds = time.perf_counter() - start
    found = {name: run.task.measures(entry.scalars()) for name, entry in sums.items()}
    zero_shot = [name for name in found if run.trained and name not in run.trained]
    items = sum(entry["sentences"] for entry in found.values())
    settings = {
        **asdict(config),
        **asdict(run.inference),
        "checkpoint_digest": sha256(run.checkpoint / MANIFEST),
        "data_fingerprint": run.data.fingerprint,
    }
    content = {
        "task": run.config.task.name,
        "split": config.split,
        "checkpoint": run.checkpoint.name,
        "sets": found,
        "average": _average({name: entry for name, entry in found.items() if name not in zero_shot} or found),
        "zero_shot": zero_shot,
        "summary": run.task.summary(found),
        "routing": {name: describe_routed(entry) for name, entry in sums.items()},
        "items": items,
        "seconds": seconds,
        "items_per_second": items / max(seconds, 1e-9),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "settings": settings,
        "notes": [note] if note else [],
        "command": sys.argv,
        "versions": versions(),
    }
    with writing(folder):
        if files.scores.exists() and _recorded_settings(files.scores) != _defining_settings(json.dumps(content)):
            content["notes"] = [*content["notes"], files.keep_earlier()]
        replace_text(files.scores, json.dumps(content, indent=1) + "\n")
    return content


def _recorded_settings(path: Path) -> dict[str, Any]:
    """:func:`_defining_settings` of a file."""
    try:
        return _defining_settings(read_regular(path))
    except OSError:
        return {}


def _defining_settings(text: str | bytes) -> dict[str, Any]:
    """The settings that determine the scores of a file; empty where it cannot be read or does not record them."""
    try:
        settings = json.loads(text)["settings"]
        unverified = settings.get("data_verify") == "never"
        return {name: settings[name] for name in _SETTINGS} | {"unverified": unverified}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


@torch.no_grad()
def _measure_set(run: LoadedRun, split: str, name: str, batches: Sequence[Indices], device: torch.device) -> MetricSums:
    criterion = run.task.build_criterion().eval()
    parts = []
    for batch in batches:
        sample = move(run.task.evaluation_sample(split, name, batch), device)
        sample["world_ntokens"] = torch.tensor(float(sample["ntokens"]), device=device)
        parts.append(MetricSums.of(criterion(run.model, sample)[2], device))
    return total(parts)


def _average(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The unweighted mean over sets of the measures that all of them have."""
    names = [name for name in (*shown_metrics(), "ppl", "nll_loss") if all(name in entry for entry in sets.values())]
    return {name: sum(entry[name] for entry in sets.values()) / len(sets) for name in names}


def show_measures(content: Mapping[str, Any], console: Console) -> None:
    """Prints a row per set."""
    names = list(content["average"])
    limit = content["settings"]["max_sentences"]
    some = f", the first {limit:,} items of each set" if limit else ""
    table = Table(title=f"{content['task']}, {content['split']}, {content['checkpoint']}{some}")
    for column in ("set", "items", *names):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, entry in content["sets"].items():
        shown = f"{name} (zero-shot)" if name in content["zero_shot"] else name
        table.add_row(shown, f"{entry['sentences']:,}", *(f"{entry[n]:.4f}" for n in names))
    table.add_row("average", f"{content['items']:,}", *(f"{content['average'][n]:.4f}" for n in names), style="bold")
    console.print(table)
    console.print(f"{content['items_per_second']:,.1f} items/s on {content['device']}")
    for note in content["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
