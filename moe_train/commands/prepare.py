"""``moe-prepare``: makes a data folder from a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Prepares the data folder and prints its summary."""
    from moe_train.config import build
    from moe_train.config.corpus import PrepareConfig
    from moe_train.data.prepare.pipeline import prepare
    from moe_train.data.prepare.summary import print_summary
    from moe_train.data.stage_progress import Progress
    from moe_train.screen import Screen

    console = Screen()
    print_summary(prepare(build(PrepareConfig, mapping), Progress(console)), console)


def main() -> None:
    """The console script."""
    run_app("prepare", run)


if __name__ == "__main__":
    main()
