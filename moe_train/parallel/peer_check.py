"""Checks that gloo's connections lead to ranks of this job.

gloo accepts the first process that connects with the expected number, so while a process group is created another user
of the host can take a rank's place. A connection lasts as long as its group, so each is checked once.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moe_train.errors import LaunchError
from moe_train.parallel.isolation import SECRET

_CPU = torch.device("cpu")


def check_peers() -> None:
    """Checks every connection of every process group of this rank, if the job has a secret. All ranks must call it.

    Each rank sends every other rank a code that only ranks of this job can compute. Groups are checked in the order of
    their creation, which is the same on all ranks.

    Raises:
        LaunchError: a process that does not know the secret has taken a rank's place.
    """
    secret = os.environ.get(SECRET, "").encode()
    for group in distributed_c10d._world.pg_map:
        if secret and dist.get_world_size(group) > 1 and _CPU in group._device_types:
            _check_group(group, secret)


def _check_group(group: dist.ProcessGroup, secret: bytes) -> None:
    own, others = dist.get_rank(group), [r for r in range(dist.get_world_size(group)) if r != dist.get_rank(group)]
    sent = {rank: _code(secret, group.group_name, own, rank) for rank in others}
    received = {rank: torch.zeros_like(code) for rank, code in sent.items()}
    works = [dist.isend(code, group=group, group_dst=rank) for rank, code in sent.items()]
    works += [dist.irecv(code, group=group, group_src=rank) for rank, code in received.items()]
    for work in works:
        assert work is not None
        work.wait()
    for rank, code in received.items():
        if not torch.equal(code, _code(secret, group.group_name, rank, own)):
            raise LaunchError(
                f"a process that does not belong to this job has the place of rank {rank} in group {group.group_name}",
                f"rank {own}",
                "another user of this host or network has connected to the job's ports: find out who, and start again",
            )


def _code(secret: bytes, group: str, sender: int, receiver: int) -> Tensor:
    text = f"{group} {sender} {receiver}".encode()
    return torch.frombuffer(bytearray(hmac.new(secret, text, hashlib.sha256).digest()), dtype=torch.uint8)
