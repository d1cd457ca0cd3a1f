"""A task's place among the ranks, from Slurm's and submitit's variables. On real clusters: tests/slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.errors import LaunchError
from moe_train.launch.job.network import interface_between_hosts, interface_towards
from moe_train.launch.slurm import job_state, node_address, set_torchrun_env, tasks_per_node

TOLD = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "n[7-9]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
# What an interpreter that asks for the node finds on PATH: Slurm's own answers, as 22.05 gives them.
SCONTROL = """#!/bin/sh
case "$2 $3" in
"show hostnames") printf 'n7\\nn8\\nn9\\n' ;;
"show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=$4 State=MIXED" ;;
"show job") echo "JobId=$4 JobName=moe-train JobState=RUNNING Reason=None" ;;
esac
"""


@pytest.fixture
def slurm_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def told(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)


@pytest.mark.processes
def test_a_task_of_srun(slurm_around: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")
    told(monkeypatch, **TOLD)
    set_torchrun_env()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == list("4501")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(os.environ["MASTER_PORT"]) < 32000
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface_between_hosts("127.0.0.1") != "lo"  # of several hosts


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, MASTER_ADDR="10.0.0.1", **TOLD)
    monkeypatch.setenv("MASTER_PORT", "12345")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    set_torchrun_env()
    found = [os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")]
    assert found == ["10.0.0.1", "12345", "ib0"] and os.environ["RANK"] == "4"


def test_one_task_is_none_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, **{**TOLD, "SLURM_STEP_NUM_TASKS": "1"})
    before = dict(os.environ)
    set_torchrun_env()
    assert dict(os.environ) == before


def test_torchrun_inside_a_task_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, **TOLD)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    set_torchrun_env()
    assert dict(os.environ) == {**before, "GLOO_SOCKET_IFNAME": "lo"}


def test_the_script_of_a_job_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, SLURM_JOB_ID="1234", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_LOCALID="0")
    set_torchrun_env()
    assert "RANK" not in os.environ


def test_a_task_of_submitit_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")
    local = {"NTASKS": "2", "GLOBALID": "1", "LOCALID": "1", "JOB_ID": "77"}
    told(monkeypatch, SUBMITIT_EXECUTOR="local", **{f"SUBMITIT_LOCAL_{name}": value for name, value in local.items()})
    set_torchrun_env()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == list("1212")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "20077")


def test_slurms_short_form_of_tasks() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("4") == [4] and tasks_per_node("1,2") == [1, 2]


@pytest.mark.processes
def test_what_slurm_says(slurm_around: None) -> None:
    assert node_address("n8") == "127.0.0.1" and job_state("9") == "RUNNING"


@pytest.mark.processes
def test_no_slurm_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"scontrol show job 9: Slurm's scontrol does not answer.*MASTER_ADDR"):
        job_state("9")


def test_the_interface_that_reaches_a_host() -> None:
    assert interface_towards("127.0.0.1") == "lo" and interface_towards("no.such.host.invalid") is None


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_first_host_that_calls_itself_loopback(hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's do: 127.0.1.1 serves on one host only, and reaches no other."""
    told(monkeypatch, MASTER_ADDR="127.0.1.1")
    for name, value in {"RANK": "0", "WORLD_SIZE": str(2 * hosts), "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    set_torchrun_env()
    taken = os.environ.get("GLOO_SOCKET_IFNAME")
    assert taken == "lo" if hosts == 1 else taken == interface_between_hosts("127.0.1.1") != "lo"
