"""The cluster that all tests of this folder share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.required import skip_or_fail
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    """Two nodes; a skip where they cannot be, which is a failure where REQUIRE_SLURM is set."""
    if reason := Cluster.why_not():
        skip_or_fail("slurm", f"no Slurm here: {reason}")
    # Not below pytest's folder, which munge finds too private: nobody else can enter it.
    with tempfile.TemporaryDirectory(prefix="moe_train-slurm-") as folder, Cluster(Path(folder)) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster without jobs; what this process asks of Slurm, through submitit too, goes to it."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, whole_cluster.environment[name])
    yield whole_cluster
    whole_cluster.cancel_all()
