"""Location of the Hydra configs: in an installed wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from moe_train.errors import ConfigError


def configs_directory() -> Path:
    """The folder with ``train.yaml``, ``prepare.yaml`` and the config groups."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "routing").is_dir():
            return candidate
    raise ConfigError("the config folder is missing", str(package), "install the package again")
