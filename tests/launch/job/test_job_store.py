"""Texts of a job's ranks: in files, and signed in a store of torch's to which others write, too."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_train.errors import LaunchError
from moe_train.launch.job.failures import Failure
from moe_train.launch.job.job_channel import JobChannel
from moe_train.launch.job.job_store import FolderStore, JobStore, MessageSigner, SignedStore
from moe_train.launch.watchdog.watchdog import _Watchdog
from moe_train.parallel.isolation import SECRET
from moe_train.training.runtime.world import World
from tests.distributed.world import Worlds
from tests.launch import jobs, torchrun

SIGNER = MessageSigner(b"of this job alone")
HUNG = Failure(1, 5.0, "it hangs")


def connected(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def server() -> Iterator[dist.TCPStore]:
    """torch's store, which takes what anyone sends."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def intruder(server: dist.TCPStore) -> dist.Store:
    """Who knows the names of all entries, and not the secret."""
    return dist.PrefixStore("moe_train/job", connected(server))


@pytest.fixture
def channel(server: dist.TCPStore) -> JobChannel:
    return JobChannel(SignedStore(connected(server), SIGNER, "job"))


@pytest.mark.parametrize("kind", ["folder", "signed"])
def test_texts_by_name(kind: str, server: dist.TCPStore, tmp_path: Path) -> None:
    store: JobStore = FolderStore(tmp_path) if kind == "folder" else SignedStore(server, SIGNER, "job")
    assert store.get(["a/0", "a/1"]) == ["", ""]
    store.put("a/1", "ä\n")
    store.put("a/1", "ö\n")
    assert store.get(["a/0", "a/1"]) == ["", "ö\n"]
    with ThreadPoolExecutor(8) as threads:
        held = set(threads.map(lambda number: store.put_first("first", str(number)), range(40)))
    assert len(held) == 1 and store.get(["first"]) == [held.pop()]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_signature_holds_for_one_entry_of_one_job() -> None:
    signed = SIGNER.sign("diagnosis", "it hangs").encode()
    assert SIGNER.verify("diagnosis", signed) == "it hangs"
    assert (
        SIGNER.verify("failure", signed) is None
        and MessageSigner(b"of another job").verify("diagnosis", signed) is None
    )
    for content in (b"", b" ", b"it hangs", b"\xff\xfe", signed[:-1], signed.replace(b"hangs", b"hungs"), signed[1:]):
        assert SIGNER.verify("diagnosis", content) is None


def test_a_forged_diagnosis_ends_nothing(
    intruder: dist.Store, channel: JobChannel, caplog: pytest.LogCaptureFixture
) -> None:
    forged = json.dumps(asdict(Failure(0, 1.0, "\x1b]0;owned\x07 all is lost")))
    with caplog.at_level(logging.WARNING, "moe_train"):
        for content in (forged, SIGNER.sign("moe_train/earlier-job/diagnosis", forged), "\x1b[2J"):
            intruder.set("diagnosis", content)
            intruder.set("failure", content)
            assert channel.diagnosis() is None and channel.first_failure(0.0) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the entry '{name}' of the job's store is not from a rank of this job: it is ignored"
        for name in ("diagnosis", "failure")
    ]
    assert channel.first_diagnosis(HUNG) == HUNG == channel.diagnosis()  # in place of the forged one
    channel.report_failure(HUNG)
    assert channel.first_failure(0.0) == HUNG
    intruder.set("shown", "1")
    before = time.monotonic()
    channel.wait_until_shown(0.2)
    assert time.monotonic() - before >= 0.2


@pytest.mark.parametrize("way", ["overwritten", "deleted"])
def test_a_rank_whose_words_are_taken_does_not_count_as_silent(
    way: str, intruder: dist.Store, channel: JobChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a rank itself has failed to say is held against it."""
    monkeypatch.setattr("moe_train.launch.watchdog.watchdog._STATUS_TIMEOUT", 0.1)
    watches = [_Watchdog(World(rank=rank, size=2), channel, limit=0.1) for rank in range(2)]
    for watch in watches:
        watch.write_status()
    assert [rank_status.sequence for rank_status in watches[0]._statuses().values()] == [0, 0]
    time.sleep(0.2)
    heard = watches[0]._diagnose()
    assert heard is not None and heard.rank == 1  # it has said nothing new
    if way == "deleted":
        intruder.delete_key("status/1")
    else:
        intruder.set("status/1", "{}")
    assert watches[0]._diagnose() is None


@pytest.mark.processes
@pytest.mark.warm_start
def test_a_forged_diagnosis_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks go on, and say what they have ignored."""
    monkeypatch.setenv(SECRET, "of this job alone")
    done = torchrun.job(2, "forged")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the sum is 3") == 2
    assert "the entry 'diagnosis' of the job's store is not from a rank of this job: it is ignored" in done.stderr


def test_ranks_with_different_secrets(worlds: Worlds) -> None:
    said = worlds(2).run_each(jobs.secret, [("0123456789abcdef",), ("fedcba9876543210",)])
    assert said[0] == said[1] and "MOE_TRAIN_SECRET: rank 1 has another secret" in said[0]
    assert worlds(2).run(jobs.secret, "0123456789abcdef") == ["", ""]


def test_a_secret_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MessageSigner.from_environment() == MessageSigner()
    monkeypatch.setenv(SECRET, "0123456789abcdef")
    assert MessageSigner.from_environment() == MessageSigner(b"0123456789abcdef")
    monkeypatch.setenv(SECRET, "hunter2")
    with pytest.raises(LaunchError, match="MOE_TRAIN_SECRET: the job's secret has 7 characters, at least 16"):
        MessageSigner.from_environment()
