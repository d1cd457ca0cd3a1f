"""Candidates for tab completion: ``-sc query=SHELL``, called by the script of Hydra's ``-sc install=SHELL``."""

from __future__ import annotations

import os
import re

from hydra import compose
from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from moe_train.commands.cli.hydra_job import composing
from moe_train.commands.cli.overrides import RUN, check_overrides, groups_of, makes_run_folder
from moe_train.errors import ConfigError

# bash's compgen -W expands its candidates: a file called $(command) would be executed.
_SAFE = re.compile(r"[\w./=+~,:@%\[\]-]+")


def candidates(config_name: str, line: str) -> list[str]:
    """Completions of the last word of a command line: keys, groups, their options, and files.

    Args:
        config_name: of the command.
        line: typed so far, including the command's name (``COMP_LINE``).
    """
    words = line.split()[1:]
    typed = words.pop() if words and not line[-1].isspace() else ""
    try:
        before = check_overrides(config_name, [word for word in words if not word.startswith("-")])
    except ConfigError:  # completion works in spite of an invalid override
        before = []
    with composing() as loader:
        config = compose(config_name, return_hydra_config=True)
        plugin = DefaultCompletionPlugin(loader)
        found = plugin._query(config_name, " ".join([*before, typed])) if not typed.startswith("-") else []
    if makes_run_folder(config) and f"{RUN}=".startswith(typed):
        found.append(f"{RUN}=")
    own = {*groups_of(config), "hydra"}
    keys = {str(key) for key in config}
    found = [word for word in found if re.split(r"[=./@]", word.lstrip("+~"))[0] in {*own, *keys, RUN}]
    key, equals, value = typed.rpartition("=")
    if equals and found in ([], [typed]):
        found = [f"{key}={path}" for path in _files(value)]
    return sorted({word for word in found if _SAFE.fullmatch(word)})


def _files(value: str) -> list[str]:
    """Files and folders whose path begins with ``value``; folders end with a slash."""
    folder, name = os.path.split(value)
    try:
        entries = list(os.scandir(os.path.expanduser(folder) or "."))
    except OSError:
        return []
    return [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
    ]
