"""What goes wrong in one rank of four while the real loop runs, under our launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.errors import UserError
from moe_train.launch.job.failures import WorkerError
from tests.training.toy import toy_config
from tests.training.toy_run import assert_same_bits, final_tensors, lines, start

pytestmark = pytest.mark.warm_start

CONFIG = toy_config(max_updates=8, log_every=1, nonfinite_limit=3, checkpoint={"every_updates": 2})


@pytest.mark.processes
def test_a_gradient_that_is_not_finite_in_one_rank(tmp_path: Path) -> None:
    """Skipped by all and counted; after the limit the run ends, names the rank, and its last checkpoint is good."""
    with pytest.raises(UserError, match=r"3 updates in a row.*update 6, rank 3.*training\.optimizer\.lr"):
        start(CONFIG, tmp_path, processes=4, trouble={"rank": 3, "update": 3, "what": "infinite"})
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 0, 1, 2]
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path).values())


@pytest.mark.slow
def test_one_skipped_update_leaves_all_ranks_alike(tmp_path: Path) -> None:
    """Half a minute. The update is skipped whichever rank spoilt it: the same bits in the end."""
    ends = []
    for rank in (0, 3):
        path = tmp_path / str(rank)
        start(CONFIG, path, processes=4, trouble={"rank": rank, "update": 4, "what": "once"}, dropout=0.0)
        assert [line["skipped"] for line in lines(path)] == [0, 0, 0, 0, 1, 1, 1, 1]
        ends.append(final_tensors(path))
    assert_same_bits(*ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("hang", ["rank 2 failed first: it hangs: ranks 0, 1 and 3 have waited", "reading samples", "in _go_wrong"]),
        (
            "memory",
            ["rank 2 failed first: RuntimeError", "can't allocate memory", "training.accumulation", "_go_wrong"],
        ),
        ("raise", ["rank 2 failed first: ZeroDivisionError: planted", "_go_wrong"]),
        ("kill", ["rank 2 failed first: it was killed by SIGKILL (exit code -9)", "dmesg"]),
    ],
)
def test_a_fault_in_one_rank_and_the_run_goes_on_afterwards(what: str, messages: list[str], tmp_path: Path) -> None:
    """Half a minute each: the message, and the same command goes on to the end."""
    with pytest.raises(WorkerError) as raised:
        start(CONFIG, tmp_path, processes=4, minutes=0.1, trouble={"rank": 2, "update": 5, "what": what})
    assert all(message in str(raised.value) for message in messages), str(raised.value)
    assert start(CONFIG, tmp_path, processes=4).status == "finished"
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [session["from_update"] for session in sessions] == [0, 4]
    assert [line["update"] for line in lines(tmp_path)] == list(range(1, 9))
