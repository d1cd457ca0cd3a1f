"""The criterion under DDP on two real processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_train.data.folder import DataFolder
from tests.distributed.world import Worlds
from tests.tasks.criterion_ranks import LOSSES, WORLD, loss_collectives, work

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]


def test_two_processes_have_the_gradients_of_one(tiny_data: DataFolder, tmp_path: Path) -> None:
    arguments = (str(tiny_data.path), str(tmp_path / "rendezvous"))
    torch.multiprocessing.spawn(work, arguments, nprocs=WORLD)  # raises what a process raised


def test_the_losses_of_a_forward_take_one_reduction(tiny_data: DataFolder, worlds: Worlds) -> None:
    """Whatever the layers, the losses and the tokens of a rank, and none in backward, also where layers run again."""
    for found in worlds(WORLD).run(loss_collectives, str(tiny_data.path)):
        for (name, recompute, batch), counted in found.items():
            losses = int(name not in ("thor", "expert_choice"))
            assert counted == (losses, 0, 0), (name, recompute, batch)
        assert len(found) == 4 * len(LOSSES)
