"""Adds config folders of plug-ins to Hydra's search path."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from moe_train.plugins import config_folders


class OutsideConfigs(SearchPathPlugin):
    """Appends ``configs`` of ``user_dir`` and of installed plug-ins, after the configs of moe_train."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra."""
        for folder in config_folders():
            search_path.append("moe_train", f"file://{folder}")
