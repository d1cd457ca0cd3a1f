"""Puts the checkout's ``configs/`` into the wheel as ``moe_train/configs``."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsInWheel(BuildHookInterface):
    """hatchling's own force-include would leave a copy of configs/ beside editable installs too, soon out of date."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it writes a wheel; ``version`` is ``standard`` or ``editable``."""
        if version != "editable":
            build_data["force_include"]["configs"] = "moe_train/configs"
