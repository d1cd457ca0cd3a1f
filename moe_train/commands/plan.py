"""``moe-plan``: what a model would cost on a cluster, and how to lay it out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.commands.cli.app import run_app
from moe_train.commands.cli.hydra_job import group_choices, overrides
from moe_train.plugins import user_dir


def run(mapping: Mapping[str, Any]) -> None:
    """Prints the plan, and writes it where ``json`` says."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from moe_train.analysis.planner.choose_layout import make_plan
    from moe_train.analysis.planner.plan_tables import as_mapping, show
    from moe_train.analysis.planner.train_command import train_command, train_words
    from moe_train.config import build
    from moe_train.config.planner import PlanConfig
    from moe_train.safe_text import for_terminal
    from moe_train.screen import Screen
    from moe_train.training.checkpoint.checksums import replace_text

    config = build(PlanConfig, mapping)
    plan = make_plan(config)
    words = train_words(plan, group_choices(), overrides())
    words += [f"user_dir={shlex.quote(outside)}"] if (outside := user_dir()) else []
    content = json.dumps({**as_mapping(plan), "train_words": words}, indent=2)
    if config.json == "-":
        print(content)
        return
    show(plan, Screen())
    print(for_terminal(f"\nTo train it (DIR: a folder of moe-prepare):\n{train_command(plan, words)}"))
    if config.json:
        replace_text(Path(config.json), content + "\n")


def main() -> None:
    """The console script."""
    run_app("plan", run)


if __name__ == "__main__":
    main()
