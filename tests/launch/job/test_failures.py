from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from moe_train.errors import DataError
from moe_train.launch.job.env import JOB
from moe_train.launch.job.failures import (
    WorkerError,
    connection_failure,
    failure_of,
    is_secondary_error,
    out_of_memory,
    read_failure,
    store_failure,
    write_agent_error,
    write_failure,
)


def test_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert out_of_memory(raised.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("x"))
    assert not out_of_memory(RuntimeError("sizes differ")) and not out_of_memory(ValueError("out of memory"))
    text = failure_of(3, raised.value).text()
    assert "rank 3 failed first: RuntimeError" in text
    assert "training.recompute=true" in text.splitlines()[-1] and "engine=deepspeed" in text.splitlines()[-1]


def test_an_error_without_text_is_named_by_its_type() -> None:
    assert "connection to another rank broke (RuntimeError)" in connection_failure(0, RuntimeError("")).text()


def test_the_remedy_stands_last_however_long_the_trace(tmp_path: Path) -> None:
    killed = read_failure(tmp_path / "none", 2, -9, 1.0)
    assert killed.killed and str(WorkerError(killed, None)).startswith("rank 2 failed first: it was killed by SIGKILL")
    assert "the kernel did because the host ran out of memory" in killed.text().splitlines()[-1]
    assert "exit code 7" in read_failure(tmp_path / "none", 2, 7, 1.0).text()
    assert "remedy" not in read_failure(tmp_path / "none", 2, -15, 1.0).text()


def test_where_a_failure_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = failure_of(1, DataError("a bad line", "text.en:7", "mend it"))
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    store_failure(failure, 1, tmp_path / "failure.json")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "rank 1 failed first: text.en:7: a bad line.\nWhat to do: mend it"
    assert told["extraInfo"]["py_callstack"] == told["message"] and told["extraInfo"]["timestamp"].isdigit()
    assert json.loads((tmp_path / "failure.json").read_text())["user"] is True
    monkeypatch.setenv(JOB, str(tmp_path))
    store_failure(failure, 1)
    assert read_failure(tmp_path / "failure_1.json", 1, 2, 0.0) == failure


def test_torchrun_s_agent_prints_text(tmp_path: Path) -> None:
    write_agent_error(failure_of(1, DataError("a bad \x1b[2Jline", "\x1b]0;owned\x07")), tmp_path / "error.json")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "rank 1 failed first: ␛]0;owned␇: a bad ␛[2Jline." == told["extraInfo"]["py_callstack"]


def test_echoes() -> None:
    broken = RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:5")
    late = RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 21000ms for recv operation to complete")
    assert (
        is_secondary_error(broken) and is_secondary_error(late) and not is_secondary_error(RuntimeError("sizes differ"))
    )
    assert "its connection to another rank broke" in connection_failure(0, broken).what
    assert connection_failure(0, late).what.startswith("a collective did not end in time ("), (
        "who has entered it nobody knows here"
    )
    assert "GLOO_SOCKET_IFNAME" in connection_failure(0, late).remedy


def test_a_torn_word_does_not_hide_the_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "failure_0.json"
    for torn in ("", '{"rank": 0, "ti', '{"rank": 0}', "[]"):
        path.write_text(torn)
        assert read_failure(path, 0, 7, 1.0).what == "it ended with exit code 7"


def test_a_full_disk_keeps_nobody_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written in part, and the word of before stays whole."""
    failure = failure_of(0, DataError("a bad line", "text.en:7", "mend it"))
    monkeypatch.setenv(JOB, str(tmp_path))
    store_failure(failure, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # bytes: writing fails in the middle of the text
    try:
        store_failure(failure, 0, tmp_path / "failure.json")
        with pytest.raises(OSError):
            write_failure(tmp_path / "failure_0.json", 0, DataError("another"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["failure_0.json"]
    assert read_failure(tmp_path / "failure_0.json", 0, 2, 0.0) == failure
