"""``moe-translate``: standard input to standard output, or a prompt where it is typed at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Translates what comes in."""
    # torch and fairseq take seconds to import: a misspelt key should not wait for them.
    from moe_train.config import build
    from moe_train.config.evaluation import TranslateConfig
    from moe_train.evaluation.translate_stream import translate_input

    translate_input(build(TranslateConfig, mapping))


def main() -> None:
    """The console script."""
    run_app("translate", run)


if __name__ == "__main__":
    main()
