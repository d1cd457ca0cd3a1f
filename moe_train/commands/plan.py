"""``moe-plan``: what a model would cost on a cluster, and how to lay it out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.commands._app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Prints the plan, and writes it where ``json`` says."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from rich.console import Console

    from moe_train.analysis.plan import make_plan
    from moe_train.analysis.plan_tables import as_mapping, show
    from moe_train.config import build
    from moe_train.config.plan import PlanConfig

    config = build(PlanConfig, mapping)
    plan = make_plan(config)
    content = json.dumps(as_mapping(plan), indent=2)
    if config.json == "-":
        print(content)
        return
    show(plan, Console())
    if config.json:
        write(Path(config.json), content)


def write(path: Path, content: str) -> None:
    """Atomically."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(content + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """The console script."""
    run_app("plan", run)


if __name__ == "__main__":
    main()
