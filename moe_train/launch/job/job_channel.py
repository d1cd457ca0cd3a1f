"""A notice board for the ranks of a job, in the store where they met: it works when collectives do not."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from moe_train.errors import LaunchError
from moe_train.launch.job.env import has_our_parent, job_folder
from moe_train.launch.job.failures import Failure
from moe_train.launch.job.job_store import FolderStore, JobStore, MessageSigner, SignedStore
from moe_train.parallel.isolation import SECRET
from moe_train.training.runtime.world import World

_PATIENCE = timedelta(seconds=10)
_VERDICT, _FAILURE, _SHOWN = "verdict", "failure", "shown"


class JobChannel:
    """What the ranks tell one another. Every method raises OSError, RuntimeError or torch's DistError where the store
    has gone."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    @classmethod
    def of(cls, world: World) -> JobChannel:
        """This world's board. Every rank calls it.

        A connection of its own, since a thread that waits for torch's would wait behind the main thread; a name of its
        own, since the store of torchrun's agent outlives the ranks. A job that was given no secret draws one, which
        travels through the process group and never through the store.

        Raises:
            LaunchError: ranks were given different secrets.
        """
        if has_our_parent():
            return cls(FolderStore(job_folder()))
        given = MessageSigner.from_environment()
        check_same_secret(given, world)
        name, drawn = world.broadcast([f"{time.time_ns()}-{os.getpid()}", secrets.token_hex(32)])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        return cls(SignedStore(store, given if given.secret else MessageSigner(drawn.encode()), name))

    def put(self, name: str, text: str) -> None:
        """Replaces what was there."""
        self._store.put(name, text)

    def get_all(self, names: Sequence[str]) -> list[str | None]:
        """The texts: empty ones where there are none, None where somebody else has altered or removed one."""
        return self._store.get(names)

    def _first(self, name: str, failure: Failure) -> Failure:
        return Failure(**json.loads(self._store.put_first(name, json.dumps(asdict(failure)))))

    def _read(self, name: str) -> Failure | None:
        text = self._store.get([name])[0]
        return Failure(**json.loads(text)) if text else None

    def verdict(self) -> Failure | None:
        """Why all must end, if they must."""
        return self._read(_VERDICT)

    def first_verdict(self, failure: Failure) -> Failure:
        """Puts a verdict, unless there is one; gives the one that holds."""
        return self._first(_VERDICT, failure)

    def shown(self) -> None:
        """Says that the user has been told the verdict."""
        self._store.put(_SHOWN, "1")

    def wait_until_shown(self, patience: float) -> None:
        """Returns once the user has been told the verdict, after ``patience`` seconds at most."""
        deadline = time.monotonic() + patience
        while not self._store.get([_SHOWN])[0] and time.monotonic() < deadline:
            time.sleep(0.05)

    def tell(self, failure: Failure) -> None:
        """Says why this rank ends, unless another one has said so before."""
        self._first(_FAILURE, failure)

    def cause(self, patience: float) -> Failure | None:
        """Why the first rank has ended, as soon as it is told; waits ``patience`` seconds at most."""
        deadline = time.monotonic() + patience
        while (found := self._read(_FAILURE)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def check_same_secret(given: MessageSigner, world: World) -> None:
    """Every rank calls it with the seal that its environment gives.

    Raises:
        LaunchError: on all ranks, where they were given different secrets.
    """
    prints = world.gather(hashlib.sha256(given.secret).hexdigest())
    others = [rank for rank, found in enumerate(prints) if found != prints[0]]
    if others:
        raise LaunchError(
            f"rank {others[0]} has another secret of the job than rank 0, or one of them has none",
            SECRET,
            "export the same value on all hosts, or leave it unset",
        )
