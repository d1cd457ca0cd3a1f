"""Hydra's process-wide store of schemas, without what other packages leave there."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore


def forget_foreign_schemas() -> None:
    """Leaves Hydra's own entries in its process-wide store of schemas.

    Importing fairseq puts dozens there, ``task/translation`` among them, and Hydra would hold our files of the same
    name against them. Our configs are checked by :mod:`moe_train.config.from_mapping` instead. The submitit
    plugin's go, too: ``configs/hydra/launcher`` has more keys.
    """
    repository = ConfigStore.instance().repo
    for name in [name for name in repository if name not in ("hydra", "_dummy_empty_config_.yaml")]:
        del repository[name]
    launchers = repository.get("hydra", {}).get("launcher", {})
    for name in [name for name in launchers if name.startswith("submitit_")]:
        del launchers[name]
