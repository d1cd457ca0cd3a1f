"""One rank of a toy run on network hosts: ``python -m tests.network.drop_job FOLDER UPDATES MINUTES SILENT``."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from moe_train.config import LaunchConfig
from moe_train.data.batching import Indices
from moe_train.errors import UserError
from moe_train.launch.job.failures import WorkerError
from moe_train.launch.job.hard_exit import exit_now
from moe_train.launch.process_group import joined_world
from moe_train.training import RunFolder, train
from tests.training.toy import ToyTask, toy_config


class Unhurried(ToyTask):
    """Takes its time over samples, so that a break of the link falls between the first update and the last."""

    def train_sample(self, indices: Indices, update: int = 0) -> dict[str, Any]:
        time.sleep(0.1)
        return super().train_sample(indices, update)


def main() -> None:
    """Exit code 2 with the message where the run cannot go on."""
    folder, updates = RunFolder(Path(sys.argv[1])), int(sys.argv[2])
    minutes, silent = map(float, sys.argv[3:5])
    config = toy_config(max_updates=updates, log_every=1, checkpoint={"every_updates": 5})
    config = dataclasses.replace(config, launch=LaunchConfig(timeout_minutes=minutes, silent_minutes=silent))
    try:
        with joined_world(config.launch, 1) as world:
            if world.main:
                folder.check(config)
                folder.begin(config)
            world.barrier()
            train(config, Unhurried(config), folder, world=world)
    except (UserError, WorkerError) as error:
        print(error, file=sys.stderr)
        exit_now(2)


if __name__ == "__main__":
    main()
