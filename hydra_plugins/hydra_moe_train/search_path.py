"""The configs of code from outside: Hydra asks its plugins for folders whenever it composes a config."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from moe_train.plugins import config_folders


class OutsideConfigs(SearchPathPlugin):
    """Appends ``configs`` of ``user_dir`` and of installed plug-ins: the configs of moe_train stand before them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra."""
        for folder in config_folders():
            search_path.append("moe_train", f"file://{folder}")
