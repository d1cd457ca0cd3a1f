"""``moe-train``: trains on a prepared data folder, in this process, in several processes, or under torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def start(mapping: Mapping[str, Any]) -> float | None:
    """Trains; returns the best value of the validation metric, for sweepers."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.commands._training import train_as_configured

    return train_as_configured(mapping)


def main() -> None:
    """The console script."""
    run_app("train", start)


if __name__ == "__main__":
    main()
