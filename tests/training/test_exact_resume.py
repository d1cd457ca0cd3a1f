"""A run that was interrupted ends as if it never had been: the same bits, the same log lines apart from times."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.launch.job.failures import WorkerError
from tests.training.toy import toy_config
from tests.training.toy_run import assert_same_bits, final_tensors, lines, start

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]

CONFIG = toy_config(max_updates=17, checkpoint={"every_updates": 5}, validation={"every_updates": 6}, log_every=4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    assert start(CONFIG, path, processes=2).status == "finished"
    return path


def check(path: Path, unbroken: Path) -> None:
    assert_same_bits(final_tensors(path), final_tensors(unbroken))
    for name in ("train.jsonl", "valid.jsonl"):
        assert lines(path, name) == lines(unbroken, name)
        assert lines(path, name)


def test_two_processes_one_of_them_killed(tmp_path: Path, unbroken: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(WorkerError, match="rank 1 failed first: it was killed by SIGKILL"):
        start(CONFIG, path, processes=2, trouble={"rank": 1, "update": 11, "what": "kill"})
    with (path / "train.jsonl").open("a") as log:
        log.write('{"update": 99}\n{"update": 1, "lo')  # what a kill may leave
    assert start(CONFIG, path, processes=2).status == "finished"
    check(path, unbroken)


def test_two_processes_asked_to_stop(tmp_path: Path, unbroken: Path) -> None:
    """In the update before a validation, which is left to the next session; there in the middle of it; then no more."""
    path = tmp_path / "run"
    for where, update in (("computing", 5), ("validation", 0)):
        plan = {"rank": 1, "update": update, "what": "term", "where": where}
        outcome = start(CONFIG, path, processes=2, trouble=plan)
        assert outcome.status == "interrupted" and outcome.update == 6
        assert not (path / "valid.jsonl").exists() or not lines(path, "valid.jsonl")
    assert start(CONFIG, path, processes=2).status == "finished"
    check(path, unbroken)


def test_one_process_goes_on_where_two_stopped(tmp_path: Path, unbroken: Path) -> None:
    """Another world: the same batches, so the same parameters but for rounding (dropout draws differ by rank)."""
    path = tmp_path / "run"
    start(CONFIG, path, processes=2, trouble={"rank": 0, "update": 6, "what": "term"}, dropout=0.0)
    assert start(CONFIG, path, processes=1, dropout=0.0).status == "finished"
    whole = tmp_path / "whole"
    start(CONFIG, whole, dropout=0.0)
    one, other = final_tensors(path), final_tensors(whole)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-5, name
