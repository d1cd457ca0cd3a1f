"""One element of an array is told to stop: it alone goes back into the queue, also where the controller is busy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, until

pytestmark = pytest.mark.slurm

# The batch shell is ours; its ranks save at once and need no torch.
SCRIPT = f"""#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
export PATH=$PWD:$PATH
source {ROOT}/scripts/slurm/job.sh
cd "$SLURM_SUBMIT_DIR"
on_all_ranks() {{
    srun bash -c 'trap "echo saved; exit 75" TERM
        echo "$SLURM_JOB_ID" > "id_$SLURM_ARRAY_TASK_ID.${{SLURM_RESTART_COUNT:-0}}"
        until [[ -e done_$SLURM_ARRAY_TASK_ID ]]; do sleep 0.1; done' &
    wait $!
    wait $!
}}
train_in nowhere
"""
# Slurm's own command, which cannot reach the controller the first two times: when asked for the state, and to requeue.
BUSY = """#!/bin/sh
case "$*" in
*"show job"* | requeue*)
    echo "$*" >> "asked_$SLURM_ARRAY_TASK_ID"
    [ "$(wc -l < "asked_$SLURM_ARRAY_TASK_ID")" -gt 2 ] || exit 1 ;;
esac
exec {scontrol} "$@"
"""


def test_one_element_is_told_to_stop(cluster: Cluster, tmp_path: Path) -> None:
    script, scontrol = tmp_path / "script.sh", tmp_path / "scontrol"
    script.write_text(SCRIPT)
    scontrol.write_text(BUSY.format(scontrol=cluster.folder / "bin" / "scontrol"))
    scontrol.chmod(0o755)
    job = cluster.submit("--array=1-2", "--output=%a.out", str(script), cwd=tmp_path)
    ids = [tmp_path / f"id_{task}.0" for task in (1, 2)]
    until(lambda: all(path.is_file() and path.read_text() for path in ids), "both elements")
    (told,) = (
        task for task, path in enumerate(ids, 1) if path.read_text().strip() == job
    )  # the array's number is its own
    other = 3 - told

    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{told}")
    until(lambda: cluster.show(f"{job}_{told}")["Restarts"] == "1", "the queue")
    (tmp_path / f"done_{told}").touch()
    assert cluster.wait_for(f"{job}_{told}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    said = (tmp_path / f"{told}.out").read_text()
    assert said.count("saved") == 1 and "assumed to be running" in said and "did not requeue it (try 1 of 6)" in said
    asked = (tmp_path / f"asked_{told}").read_text().splitlines()
    assert asked == [f"--oneliner show job {job}_{told}", f"requeue {job}_{told}"] * 2

    sibling = cluster.show(f"{job}_{other}")
    assert (sibling["JobState"], sibling["Restarts"]) == ("RUNNING", "0")
    (tmp_path / f"done_{other}").touch()
    assert cluster.wait_for(f"{job}_{other}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert (tmp_path / f"{other}.out").read_text() == ""
