"""The criterion under DDP on two real processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_train.data.folder import DataFolder
from tests.tasks.criterion_ranks import WORLD, work

pytestmark = pytest.mark.processes


def test_two_processes_have_the_gradients_of_one(tiny_data: DataFolder, tmp_path: Path) -> None:
    arguments = (str(tiny_data.path), str(tmp_path / "rendezvous"))
    torch.multiprocessing.spawn(work, arguments, nprocs=WORLD)  # raises what a process raised
