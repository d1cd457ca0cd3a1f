"""Ranks know one another by the job's secret, on every connection of every group."""

from __future__ import annotations

from tests.distributed.world import Worlds
from tests.parallel.peer_jobs import meet


def test_ranks_of_one_job_know_one_another(worlds: Worlds) -> None:
    assert worlds(3).run(meet, "of this job alone") == [("", 9.0)] * 3
    assert worlds(3).run(meet, "") == [("", 9.0)] * 3, "a job without a secret is not held up"


def test_who_has_a_rank_s_place_without_the_secret_is_found(worlds: Worlds) -> None:
    secrets = ["of this job alone", "of this job alone", "guessed by somebody"]
    said = [text for text, _ in worlds(3).run_each(meet, [(secret,) for secret in secrets])]
    for rank in (0, 1):
        assert said[rank].startswith(f"rank {rank}: a process that does not belong to this job has the place of rank 2")
    assert "has the place of rank 0" in said[2]
