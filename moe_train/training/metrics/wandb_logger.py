"""``training.loggers=[wandb]``: Weights & Biases. Offline, unless the variable WANDB_MODE says otherwise."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig, to_mapping
from moe_train.training.checkpoint.checksums import replace_text
from moe_train.training.metrics.flat_numbers import flat_numbers
from moe_train.training.run.run_folder import RunFolder
from moe_train.utils.json_files import read_object

IDENTITY = "wandb.json"  # in the run folder: the id that all sessions of the run have


class WandbLogger:
    """One W&B run for all sessions of a run, in ``wandb/`` of the run folder.

    W&B's variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP …) have their meaning. Source code, git, the
    console's output and the machine's state are not recorded.
    """

    def __init__(self, folder: Path, config: RunConfig, update: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of W&B's own errors are sent in any mode
        import wandb

        self._folder = RunFolder(folder)
        path = folder / IDENTITY
        known = read_object(path, "remove it: a new W&B run is begun") or {}
        identity = str(known.get("id") or secrets.token_hex(4))
        replace_text(path, json.dumps({"id": identity}) + "\n")
        mode = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "moe_train",
            name=os.environ.get("WANDB_NAME") or folder.name,
            id=identity,
            dir=str(folder),
            config=to_mapping(config),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        # Lines of a resumed run may repeat updates, which W&B's own step cannot.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def trained(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of train.jsonl, as ``train/NAME``."""
        self._log("train", line)

    def validated(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of valid.jsonl, as ``valid/NAME``."""
        self._log("valid", line)

    def _log(self, group: str, line: Mapping[str, Any]) -> None:
        self._run.log({"update": int(line["update"]), **dict(flat_numbers(line, group))})

    def close(self) -> None:
        """Ends this session of the run."""
        self._run.finish(exit_code=0 if self._folder.finished else 1)
