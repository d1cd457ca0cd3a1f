"""``moe-evaluate``: translates a held-out split and scores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands._app import run_app


def run(mapping: Mapping[str, Any]) -> float:
    """Evaluates and prints the table; returns the average chrF++, which a sweeper may maximise."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from rich.console import Console

    from moe_train.config import build
    from moe_train.config.evaluation import EvaluateConfig
    from moe_train.evaluation.evaluate import evaluate
    from moe_train.evaluation.table import show

    results = evaluate(build(EvaluateConfig, mapping), Console(stderr=True))
    show(results, Console())
    return results.average().chrf


def main() -> None:
    """The console script."""
    run_app("evaluate", run)


if __name__ == "__main__":
    main()
