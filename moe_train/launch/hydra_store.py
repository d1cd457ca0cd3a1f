"""Removes entries of other packages from Hydra's process-wide config store."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore


def forget_foreign_schemas() -> None:
    """Removes all schemas from Hydra's process-wide config store except its own.

    Importing fairseq adds dozens, ``task/translation`` among them, and Hydra would check our files of the same name
    against them. :mod:`moe_train.config.from_mapping` checks our configs instead. Those of the submitit plugin are
    removed, too, since ``configs/hydra/launcher`` has more keys.
    """
    repository = ConfigStore.instance().repo
    for name in [name for name in repository if name not in ("hydra", "_dummy_empty_config_.yaml")]:
        del repository[name]
    launchers = repository.get("hydra", {}).get("launcher", {})
    for name in [name for name in launchers if name.startswith("submitit_")]:
        del launchers[name]
