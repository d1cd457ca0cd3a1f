"""Of the words of the runs' command lines, those that tell the runs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_train.analysis.report.load_runs import RunReport

# How a run was started and kept, which changes neither what it computes nor how fast. Groups end with a dot.
_SILENT = (
    "resume",
    "evaluate",
    "data_verify",
    "hydra.",
    "hydra/",
    "launch.port",
    "launch.timeout_minutes",
    "launch.silent_minutes",
    "training.log_every",
    "training.checkpoint.every_updates",
    "training.checkpoint.keep",
    "training.checkpoint.asynchronous",
    "training.checkpoint.damaged",
)


def settings(runs: Sequence[RunReport]) -> Mapping[str, tuple[str, ...]]:
    """By name of the run: its words that not all runs have, without the strategy, which has a column of its own."""
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    return {run.name: tuple(w for w in run.overrides if w not in common and _tells(w)) for run in runs}


def _tells(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return key != "routing" and not any(key == name or (name[-1] in "./" and key.startswith(name)) for name in _SILENT)
