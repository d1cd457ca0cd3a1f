"""``moe-plan``: predicts memory, traffic and time of a model on a cluster, and chooses a layout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.commands.cli.app import run_app
from moe_train.commands.cli.hydra_job import group_choices, overrides
from moe_train.errors import ConfigError
from moe_train.plugins import user_dir


def run(mapping: Mapping[str, Any]) -> None:
    """Prints the plan, and writes it to the file ``json``."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.analysis.planner.choose_layout import compare_layouts
    from moe_train.analysis.planner.plan_tables import as_mapping, print_plan
    from moe_train.analysis.planner.train_command import train_command, train_words
    from moe_train.config import build
    from moe_train.config.planner import PlanConfig
    from moe_train.safe_text import for_terminal
    from moe_train.screen import Screen
    from moe_train.training.checkpoint.checksums import replace_text

    config = build(PlanConfig, mapping)
    plan = compare_layouts(config)
    words = train_words(plan, group_choices(), overrides())
    words += [f"user_dir={shlex.quote(outside)}"] if (outside := user_dir()) else []
    content = json.dumps({**as_mapping(plan), "train_words": words}, indent=2)
    if config.json == "-":
        print(content)
        return
    print_plan(plan, Screen())
    print(for_terminal(f"\nTo train it (DIR: a folder of moe-prepare):\n{train_command(plan, words)}"))
    if config.json:
        try:
            replace_text(Path(config.json), content + "\n")
        except OSError as error:
            raise ConfigError(f"the plan cannot be written ({error.strerror})", f"json={config.json}") from error


def main() -> None:
    """The console script."""
    run_app("plan", run)


if __name__ == "__main__":
    main()
