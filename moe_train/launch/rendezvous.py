"""Ranks of one life of a job under torchrun meet, and none of them takes an address of the life before for a new one.

torchrun's agent keeps one store over all restarts, and torch's ranks write their addresses under the same names each
time. A rank that is quicker than another then reads where the dead one listened ("Connection refused"), and a restart
is lost. Restart counts do not help: each agent has its own. So rank 0 draws a name for this life, and a rank believes
a name only when rank 0 has answered to a word of its own under it. Where the job has a secret, all of that is signed.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from moe_train.launch.job.job_store import MessageSigner, ignore

_NAME = "moe_train/life"
_PAUSE = 0.05


def fresh_store(rank: int, size: int, limit: timedelta, seal: MessageSigner) -> dist.Store:
    """The agent's store, seen through a name that only this life of the job has. Every rank calls it.

    Raises:
        DistStoreError: the others cannot be found in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    deadline = time.monotonic() + limit.total_seconds()
    name = _welcome(store, size, deadline, seal) if rank == 0 else _arrive(store, rank, deadline, seal)
    return dist.PrefixStore(f"moe_train/{name}", store)


def _welcome(store: dist.Store, size: int, deadline: float, seal: MessageSigner) -> str:
    name = uuid.uuid4().hex
    store.set(_NAME, seal.sign(_NAME, name))
    for rank in range(1, size):
        word = seal.wait_for(store, f"{name}/{rank}", deadline)
        store.set(f"{name}/{word}", seal.sign(f"{name}/{word}", "welcome"))
    return name


def _arrive(store: dist.Store, rank: int, deadline: float, seal: MessageSigner) -> str:
    word, told = uuid.uuid4().hex, ""
    while time.monotonic() < deadline:
        name = seal.open(_NAME, store.get(_NAME))
        if name is None:
            ignore(_NAME)
        elif name != told:
            store.set(f"{name}/{rank}", seal.sign(f"{name}/{rank}", word))
            told = name
        answer = f"{told}/{word}"
        if told and store.check([answer]) and seal.open(answer, store.get(answer)) is not None:
            return told
        time.sleep(_PAUSE)
    raise dist.DistStoreError("rank 0 does not answer")
