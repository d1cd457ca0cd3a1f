"""``moe-evaluate``: translates a held-out split and scores it, or measures what the run's task measures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from moe_train.commands._app import run_app
from moe_train.launch.environment import under_launcher


def run(mapping: Mapping[str, Any]) -> float:
    """Evaluates and prints the table; returns the average chrF++ (or accuracy …), which a sweeper may maximise."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from rich.console import Console

    from moe_train.config import build
    from moe_train.config.evaluation import EvaluateConfig
    from moe_train.evaluation.evaluate import evaluate
    from moe_train.evaluation.measured import measure, show_measures
    from moe_train.evaluation.table import show
    from moe_train.launch.joining import joined_world
    from moe_train.training.run_folder import RunFolder
    from moe_train.training.world import World

    config = build(EvaluateConfig, mapping)
    if not RunFolder.open(config.run).config.task.translates:
        measured = measure(config)
        show_measures(measured, Console())
        return next(iter(measured["average"].values()))
    with joined_world(config.launch) if under_launcher() else nullcontext(World()) as world:
        results = evaluate(config, Console(stderr=True) if world.main else None)
    if world.main:
        show(results, Console())
    return results.average().chrf


def main() -> None:
    """The console script."""
    run_app("evaluate", run)


if __name__ == "__main__":
    main()
