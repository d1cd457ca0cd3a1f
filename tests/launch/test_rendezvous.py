"""Ranks of one life meet in a store that remembers another life."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moe_train.launch.job.hard_exit import run_with_timeout
from moe_train.launch.job.job_store import MessageSigner
from moe_train.launch.rendezvous import fresh_store

LIMIT = timedelta(seconds=30)
SIGNER = MessageSigner(b"of this job alone")


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that outlives ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_nobody_takes_a_word_of_the_dead_for_a_new_one(agent: dist.TCPStore) -> None:
    """Three lives of three ranks; in each the others are quicker than rank 0 and find the old name first."""
    for life in range(3):
        with ThreadPoolExecutor(3) as ranks:
            late = [ranks.submit(fresh_store, rank, 3, LIMIT, SIGNER) for rank in (1, 2)]
            time.sleep(0.3)
            assert not any(one.done() for one in late)
            stores = [fresh_store(0, 3, LIMIT, SIGNER), *(one.result() for one in late)]
        assert not stores[1].check(["address"])  # of the life before
        stores[0].set("address", f"life {life}")
        assert [store.get("address") for store in stores] == [f"life {life}".encode()] * 3


def test_rank_0_does_not_come(agent: dist.TCPStore) -> None:
    agent.set("moe_train/restart", "old")
    with pytest.raises(dist.DistStoreError, match="rank 0 does not answer"):
        fresh_store(1, 2, timedelta(seconds=0.5), MessageSigner())


def test_a_question_that_nobody_answers() -> None:
    started = time.monotonic()
    assert run_with_timeout(0.2, lambda: threading.Event().wait()) is None
    assert time.monotonic() - started < 20
    assert run_with_timeout(10, lambda: 3) == 3 and run_with_timeout(10, lambda: 1 // 0) is None
