"""Composes configs, and reads folder and overrides of the running Hydra job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.launch.hydra_store import forget_foreign_schemas


@contextmanager
def composing(config_dir: str | None = None) -> Iterator[ConfigLoaderImpl]:
    """While entered, ``hydra.compose`` finds our configs, and the user's as in a Hydra app.

    Args:
        config_dir: a folder of the user's own configs (``--config-dir``).

    Raises:
        ConfigError: the folder does not exist.
    """
    if config_dir is not None and not os.path.isdir(config_dir):
        raise ConfigError("the folder does not exist", f"--config-dir {config_dir}", "correct the path")
    with initialize_config_dir(str(configs_directory()), version_base="1.3"):
        forget_foreign_schemas()  # of fairseq, which a module of user_dir may import, and of Hydra's plugins
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        if config_dir is not None:
            folder = f"file://{os.path.abspath(config_dir)}"
            loader.config_search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(loader.config_search_path)
        yield loader


def run_directory() -> Path:
    """The folder that Hydra has made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def overrides() -> list[str]:
    """The overrides of the command line, or of the present job of a sweep."""
    return [str(word) for word in HydraConfig.get().overrides.task]


def group_choices() -> dict[str, str]:
    """The chosen option of each group, such as ``{"routing": "sam", "model": "base"}``."""
    return {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def remove_empty_run_folder() -> None:
    """Removes the run folder with the time in its name, and that of its day, if they contain nothing but a lock.

    A folder that the user has named is kept: it may have existed before.
    """
    folder = run_directory()
    named = in_sweep() or any(word.startswith("hydra.run.dir=") for word in HydraConfig.get().overrides.hydra)
    if not named and folder != Path.cwd():
        with suppress(OSError):  # not empty
            if [entry.name for entry in folder.iterdir()] == [".lock"]:  # no other process uses it: the name is new
                (folder / ".lock").unlink()
            folder.rmdir()
            folder.parent.rmdir()
