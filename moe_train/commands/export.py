"""``moe-export``: writes a trained model as one directory of safetensors, config and dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.commands.cli.app import run_app


def run(mapping: Mapping[str, Any]) -> None:
    """Exports, and prints the folder."""
    # Imported here: torch and fairseq take seconds, and errors in keys are shown before.
    from moe_train.config import build
    from moe_train.config.evaluation import ExportConfig
    from moe_train.conversion.export_huggingface import export_huggingface
    from moe_train.evaluation.export_model import export_run
    from moe_train.screen import Screen

    config = build(ExportConfig, mapping)
    folder = {"moe_train": export_run, "huggingface": export_huggingface}[config.format](config)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Screen().print(f"exported: {folder} ({size / 1e6:,.1f} MB)", highlight=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    run_app("export", run)


if __name__ == "__main__":
    main()
