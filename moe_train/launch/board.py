"""A notice board for the ranks of a job, in the store where they met: it works when collectives do not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from moe_train.launch.failures import Failure
from moe_train.training.world import World

_PATIENCE = timedelta(seconds=10)
_VERDICT, _FAILURE, _SHOWN = "verdict", "failure", "shown"


class Board:
    """Small texts by name. Every method raises torch's DistError or RuntimeError where the store has gone."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    @classmethod
    def of(cls, world: World) -> Board:
        """This world's board. Every rank calls it.

        A connection of its own, since a thread that waits for torch's would wait behind the main thread; a name of its
        own, since the store of torchrun's agent outlives the ranks.
        """
        name = world.broadcast(f"{time.time_ns()}-{os.getpid()}")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        return cls(dist.PrefixStore(f"moe_train/{name}", store))

    def put(self, name: str, text: str) -> None:
        """Replaces what was there."""
        self._store.set(name, text)

    def get_all(self, names: Sequence[str]) -> list[str]:
        """The texts; empty ones where there are none."""
        there = [name for name in names if self._store.check([name])]
        texts = dict(zip(there, self._store.multi_get(there), strict=True)) if there else {}
        return [texts[name].decode() if name in texts else "" for name in names]

    def _first(self, name: str, failure: Failure) -> Failure:
        return Failure(**json.loads(self._store.compare_set(name, "", json.dumps(asdict(failure)))))

    def _read(self, name: str) -> Failure | None:
        return Failure(**json.loads(self._store.get(name))) if self._store.check([name]) else None

    def verdict(self) -> Failure | None:
        """Why all must end, if they must."""
        return self._read(_VERDICT)

    def first_verdict(self, failure: Failure) -> Failure:
        """Puts a verdict, unless there is one; gives the one that holds."""
        return self._first(_VERDICT, failure)

    def shown(self) -> None:
        """Says that the user has been told the verdict."""
        self._store.set(_SHOWN, "1")

    def wait_until_shown(self, patience: float) -> None:
        """Returns once the user has been told the verdict, after ``patience`` seconds at most."""
        deadline = time.monotonic() + patience
        while not self._store.check([_SHOWN]) and time.monotonic() < deadline:
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
