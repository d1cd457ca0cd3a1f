"""``moe-evaluate``: translates a held-out split and scores it, or computes the measures of the run's task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from moe_train.commands.cli.app import print_error_once, run_app
from moe_train.launch.job.env import under_launcher


def run(mapping: Mapping[str, Any]) -> float:
    """Evaluates and prints the table; returns the average chrF++ (or accuracy …), which a sweeper may maximise."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.commands._scoring import score
    from moe_train.config import build
    from moe_train.config.evaluation import EvaluateConfig
    from moe_train.evaluation.decode_ep import plan_evaluation
    from moe_train.launch.process_group import joined_world, ranks_per_node, world_size
    from moe_train.training.run.run_folder import RunFolder
    from moe_train.training.runtime.world import World

    config = build(EvaluateConfig, mapping)
    with print_error_once():  # before the rendezvous, verification of checkpoints and encoding
        trained = RunFolder.open(config.run).config
        if trained.task.translates:
            plan_evaluation(trained, config.expert_parallel, world_size(config.launch), ranks_per_node(config.launch))
    together = under_launcher() and trained.task.translates
    with joined_world(config.launch) if together else nullcontext(World()) as world:
        return score(config, world)


def main() -> None:
    """The console script."""
    run_app("evaluate", run)


if __name__ == "__main__":
    main()
