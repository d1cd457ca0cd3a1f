"""What Hydra knows of the job that it runs: its folder and its words."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def run_directory() -> Path:
    """The folder that Hydra has made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def overrides() -> list[str]:
    """The words of the command line that made this run's config; of a sweep's job, its own."""
    return [str(word) for word in HydraConfig.get().overrides.task]


def group_choices() -> dict[str, str]:
    """The option of each group that the config was made with, such as ``{"routing": "sam", "model": "base"}``."""
    return {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}


def in_sweep() -> bool:
    """Whether this is a sweep's job."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def forget_folder() -> None:
    """Removes the folder with the time in its name, and the day's, where nothing came into them but a lock.

    A folder that was named stays: it may have been there before.
    """
    folder = run_directory()
    named = in_sweep() or any(word.startswith("hydra.run.dir=") for word in HydraConfig.get().overrides.hydra)
    if not named and folder != Path.cwd():
        with suppress(OSError):  # not empty
            if [entry.name for entry in folder.iterdir()] == [".lock"]:  # nobody else waits for: the name is new
                (folder / ".lock").unlink()
            folder.rmdir()
            folder.parent.rmdir()
