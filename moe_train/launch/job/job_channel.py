"""Messages between the ranks of a job through its store, which works when collectives do not."""

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

_STORE_TIMEOUT = timedelta(seconds=10)
_DIAGNOSIS, _FAILURE, _SHOWN = "diagnosis", "failure", "shown"


class JobChannel:
    """Exchanges status, failures and the diagnosis of a job.

    Every method raises OSError, RuntimeError or torch's DistError where the store is gone.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store

    @classmethod
    def of(cls, world: World) -> JobChannel:
        """The channel of this world. Every rank calls it.

        It opens its own connection, since a thread that uses torch's would wait for the main thread, and draws a name,
        since the store of torchrun's agent outlives the ranks. Where the environment gives no secret, rank 0 draws one
        and sends it through the process group, never through the store.

        Raises:
            LaunchError: ranks were given different secrets.
        """
        if has_our_parent():
            return cls(FolderStore(job_folder()))
        given = MessageSigner.from_environment()
        check_same_secret(given, world)
        name, drawn = world.broadcast([f"{time.time_ns()}-{os.getpid()}", secrets.token_hex(32)])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        return cls(SignedStore(store, given if given.secret else MessageSigner(drawn.encode()), name))

    def put(self, name: str, text: str) -> None:
        """Writes a text, replacing an earlier one."""
        self._store.put(name, text)

    def get_all(self, names: Sequence[str]) -> list[str | None]:
        """The texts: empty where there is none, None where another process has altered or removed one."""
        return self._store.get(names)

    def _put_first(self, name: str, failure: Failure) -> Failure:
        return Failure(**json.loads(self._store.put_first(name, json.dumps(asdict(failure)))))

    def _read(self, name: str) -> Failure | None:
        text = self._store.get([name])[0]
        return Failure(**json.loads(text)) if text else None

    def diagnosis(self) -> Failure | None:
        """The failure for which all ranks must end; None: there is none."""
        return self._read(_DIAGNOSIS)

    def first_diagnosis(self, failure: Failure) -> Failure:
        """Writes the diagnosis unless there is one; returns the one in the store."""
        return self._put_first(_DIAGNOSIS, failure)

    def mark_shown(self) -> None:
        """Records that the diagnosis has been shown to the user."""
        self._store.put(_SHOWN, "1")

    def wait_until_shown(self, timeout: float) -> None:
        """Returns once the diagnosis has been shown to the user, after ``timeout`` seconds at most."""
        deadline = time.monotonic() + timeout
        while not self._store.get([_SHOWN])[0] and time.monotonic() < deadline:
            time.sleep(0.05)

    def report_failure(self, failure: Failure) -> None:
        """Writes why this rank ends, unless another rank has written its failure before."""
        self._put_first(_FAILURE, failure)

    def first_failure(self, timeout: float) -> Failure | None:
        """The failure of the first rank that has ended; waits for it ``timeout`` seconds at most."""
        deadline = time.monotonic() + timeout
        while (found := self._read(_FAILURE)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def check_same_secret(given: MessageSigner, world: World) -> None:
    """Checks that all ranks have the same secret. Every rank calls it with the signer from its environment.

    Raises:
        LaunchError: on all ranks, where the secrets differ.
    """
    digests = world.gather(hashlib.sha256(given.secret).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise LaunchError(
            f"rank {others[0]} has another secret of the job than rank 0, or one of them has none",
            SECRET,
            "export the same value on all hosts, or leave it unset",
        )
