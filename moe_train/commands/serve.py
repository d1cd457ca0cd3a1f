"""``moe-serve``: translates over HTTP, with a page that shows the experts of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Serves until it is interrupted."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.config import build
    from moe_train.config.serving import ServeConfig
    from moe_train.evaluation.serving.server import serve

    serve(build(ServeConfig, mapping))


def main() -> None:
    """The console script."""
    run_app("serve", run)


if __name__ == "__main__":
    main()
