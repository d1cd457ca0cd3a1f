"""``moe-train``: trains on a prepared data folder, in this process, in processes of its own, or under torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def start(mapping: Mapping[str, Any]) -> float | None:
    """Trains; gives the best value of the validation metric, for sweepers."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from moe_train.commands._training import train_as_configured

    return train_as_configured(mapping)


def main() -> None:
    """The console script."""
    run_app("train", start)


if __name__ == "__main__":
    main()
