"""Selects the overrides that differ between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_train.analysis.report.load_runs import RunReport

# Keys that change neither the result nor the speed of a run. Groups end with a dot or slash.
_IGNORED = (
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
    """By name of the run: its overrides that not all runs have, without the strategy, which has its own column."""
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    return {run.name: tuple(w for w in run.overrides if w not in common and _is_shown(w)) for run in runs}


def _is_shown(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return key != "routing" and not any(key == name or (name[-1] in "./" and key.startswith(name)) for name in _IGNORED)
