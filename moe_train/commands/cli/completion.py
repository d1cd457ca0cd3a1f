"""What the Tab key offers: ``-sc query=SHELL``, which the script of Hydra's ``-sc install=SHELL`` asks for it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hydra import compose
from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from moe_train.commands.cli.hydra_job import composing
from moe_train.commands.cli.overrides import RUN, check_overrides, groups_of, makes_run_folder
from moe_train.errors import ConfigError

# The shell's own function for this (bash: compgen -W) expands its candidates: a file called $(command) would be run.
_HARMLESS = re.compile(r"[\w./=+~,:@%\[\]-]+")


def candidates(config_name: str, line: str) -> list[str]:
    """What the last word of a command line may become: keys, groups, their options, and files.

    Args:
        config_name: of the command.
        line: what was typed so far, the command's name included (``COMP_LINE``).
    """
    words = line.split()[1:]
    typed = words.pop() if words and not line[-1].isspace() else ""
    before = _understood(config_name, [word for word in words if not word.startswith("-")])
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
    return sorted({word for word in found if _HARMLESS.fullmatch(word)})


def _understood(config_name: str, words: Sequence[str]) -> list[str]:
    """The words as Hydra wants them; none where one of them is wrong, so that completion goes on."""
    try:
        return check_overrides(config_name, words)
    except ConfigError:
        return []


def _files(value: str) -> list[str]:
    """Files and folders whose path begins so; folders end with a slash."""
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
