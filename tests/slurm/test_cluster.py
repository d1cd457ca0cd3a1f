"""The cluster itself: what the other tests of this folder stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_two_nodes_on_hosts_of_their_own(cluster: Cluster) -> None:
    said = cluster.run("srun", "-N2", "sh", "-c", "hostname; hostname -I").stdout.split()
    assert sorted(said) == ["10.213.7.1", "10.213.7.2", "n1", "n2"]


def test_a_more_urgent_job_requeues_another_and_tells_it_first(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text('#!/bin/bash\ntrap "echo told >> told; exit 0" USR1\n: > begun\nsleep 600 & wait\n')
    job = cluster.submit("--nodes=2", "--signal=B:USR1@60", str(script), cwd=tmp_path)
    cluster.wait_for(job, "RUNNING")
    while not (tmp_path / "begun").exists():
        cluster.wait_for(job, "RUNNING")
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    cluster.wait_for(urgent, "COMPLETED")
    assert (tmp_path / "told").read_text() == "told\n"
    assert cluster.show(job)["JobState"] == "COMPLETED"
