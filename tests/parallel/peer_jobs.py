"""A rank that knows the job's secret, or does not."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from moe_train.errors import LaunchError
from moe_train.parallel.isolation import SECRET
from moe_train.parallel.peer_check import check_peers
from moe_train.training.runtime.world import World


def meet(secret: str) -> tuple[str, float]:
    """What the check of all groups says, one of them made here; and a sum afterwards, in the same groups."""
    world, said = World.current(), ""
    group = dist.new_group()
    os.environ[SECRET] = secret
    try:
        check_peers()
    except LaunchError as error:
        said = str(error)
    finally:
        del os.environ[SECRET]
    value = world.sum(torch.ones(1))
    dist.all_reduce(value, group=group)
    return said, float(value)
