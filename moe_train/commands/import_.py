"""``moe-import``: reads a model of Hugging Face transformers and writes it as a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Imports, and prints the folder."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.config import build
    from moe_train.config.evaluation import ImportConfig
    from moe_train.conversion.import_model import import_model
    from moe_train.screen import Screen

    folder = import_model(build(ImportConfig, mapping))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Screen().print(f"imported: {folder} ({size / 1e6:,.1f} MB)", highlight=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    run_app("import", run)


if __name__ == "__main__":
    main()
