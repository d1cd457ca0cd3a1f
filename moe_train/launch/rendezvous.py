"""Rendezvous that ignores store keys left by earlier torchrun restarts.

torchrun's agent keeps one store over all restarts, and torch's ranks write their addresses under the same keys each
time. A rank that starts before another then reads the address of the dead one ("Connection refused"), and the restart
fails. Restart counts do not help, since each agent has its own. So rank 0 draws a key prefix for each restart. Another
rank accepts a prefix once rank 0 has answered a random token that the rank has written under it. Where the job has a
secret, all entries are signed.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from moe_train.launch.job.job_store import MessageSigner, log_ignored

_PREFIX_KEY = "moe_train/restart"
_POLL = 0.05  # seconds


def fresh_store(rank: int, size: int, limit: timedelta, signer: MessageSigner) -> dist.Store:
    """The agent's store under a prefix that only this restart of the job has. Every rank calls it.

    Raises:
        DistStoreError: the other ranks do not answer in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    deadline = time.monotonic() + limit.total_seconds()
    prefix = _draw_prefix(store, size, deadline, signer) if rank == 0 else _read_prefix(store, rank, deadline, signer)
    return dist.PrefixStore(f"moe_train/{prefix}", store)


def _draw_prefix(store: dist.Store, size: int, deadline: float, signer: MessageSigner) -> str:
    prefix = uuid.uuid4().hex
    store.set(_PREFIX_KEY, signer.sign(_PREFIX_KEY, prefix))
    for rank in range(1, size):
        token = signer.wait_for(store, f"{prefix}/{rank}", deadline)
        store.set(f"{prefix}/{token}", signer.sign(f"{prefix}/{token}", "ok"))
    return prefix


def _read_prefix(store: dist.Store, rank: int, deadline: float, signer: MessageSigner) -> str:
    token, current = uuid.uuid4().hex, ""
    while time.monotonic() < deadline:
        prefix = signer.verify(_PREFIX_KEY, store.get(_PREFIX_KEY))
        if prefix is None:
            log_ignored(_PREFIX_KEY)
        elif prefix != current:
            store.set(f"{prefix}/{rank}", signer.sign(f"{prefix}/{rank}", token))
            current = prefix
        answer = f"{current}/{token}"
        if current and store.check([answer]) and signer.verify(answer, store.get(answer)) is not None:
            return current
        time.sleep(_POLL)
    raise dist.DistStoreError("rank 0 does not answer")
