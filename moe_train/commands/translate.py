"""``moe-translate``: translates standard input, or lines typed at a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Translates standard input."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.config import build
    from moe_train.config.evaluation import TranslateConfig
    from moe_train.evaluation.inference.translate_stream import translate_input

    translate_input(build(TranslateConfig, mapping))


def main() -> None:
    """The console script."""
    run_app("translate", run)


if __name__ == "__main__":
    main()
