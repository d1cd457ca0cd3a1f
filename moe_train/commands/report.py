"""``moe-report``: compares runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Prints and writes the leaderboard."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.analysis.report.build_report import make_report
    from moe_train.config import build
    from moe_train.config.evaluation import ReportConfig
    from moe_train.screen import Screen

    make_report(build(ReportConfig, mapping), Screen())


def main() -> None:
    """The console script."""
    run_app("report", run)


if __name__ == "__main__":
    main()
