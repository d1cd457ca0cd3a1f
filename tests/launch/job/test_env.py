"""What launchers say through the environment, where it cannot be."""

from __future__ import annotations

import sys

import pytest

from moe_train.commands import plan
from moe_train.errors import LaunchError
from moe_train.launch.job.env import check_environment
from moe_train.launch.slurm import set_torchrun_env

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "7",
}


def told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None]) -> None:
    for name in (*TORCHRUN, *variables):
        monkeypatch.setenv(name, "")  # so that what set_torchrun_env sets is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        (
            {name: None for name in TORCHRUN if name != "RANK"},
            "RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        ),
        ({"MASTER_ADDR": None}, "RANK is set without MASTER_ADDR"),
        ({"MASTER_ADDR": ""}, "RANK is set without MASTER_ADDR"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"RANK": ""}, "RANK='' is not a whole number"),
        ({"RANK": "²"}, "RANK='²' is not a whole number"),
        ({"RANK": "1.0"}, "RANK='1.0' is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "is not a whole number from 1"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a whole number from 1 to 65535"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x' is not a whole number"),
        ({"RANK": None, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' is not a whole number from 1"),
    ],
)
def test_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], said: str) -> None:
    told(monkeypatch, {**TORCHRUN, **changes})
    if not said:
        check_environment()
        return
    with pytest.raises(LaunchError, match="environment: ") as raised:
        check_environment()
    assert said in str(raised.value) and "or unset them" in str(raised.value)


@pytest.mark.parametrize("missing", [name for name in SRUN if name.startswith("SLURM") and "NUM_TASKS" not in name])
@pytest.mark.parametrize("value", [None, "", "x"])
def test_variables_of_srun(monkeypatch: pytest.MonkeyPatch, missing: str, value: str | None) -> None:
    told(monkeypatch, {**SRUN, missing: value})
    if missing == "SLURM_STEP_NODELIST" and value is not None:
        set_torchrun_env()  # MASTER_ADDR is given, and nobody asks for the nodes
        return
    with pytest.raises(LaunchError, match=missing):
        set_torchrun_env()


def test_more_nodes_than_slurm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, {**SRUN, "SLURM_NODEID": "2"})
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE do not give"):
        set_torchrun_env()
    told(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "x"})
    with pytest.raises(LaunchError, match="SLURM_STEP_NUM_TASKS='x'"):
        set_torchrun_env()


@pytest.mark.parametrize("missing", [name for name in SUBMITIT if name.startswith("SUBMITIT_LOCAL")])
def test_variables_of_submitit(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for value in ("x", "-2"):
        told(monkeypatch, {**SUBMITIT, missing: value})
        with pytest.raises(LaunchError, match=missing):
            set_torchrun_env()


def test_a_lonely_rank_is_one_message(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It ended in a KeyError."""
    told(monkeypatch, {"RANK": "0"})
    monkeypatch.setattr("moe_train.commands.cli.app.exit_now", sys.exit)  # a rank's way out does not return
    monkeypatch.setattr(sys, "argv", ["moe-plan", "model=tiny"])
    with pytest.raises(SystemExit) as left:
        plan.main()
    assert left.value.code == 2
    assert "RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Start with torchrun" in capfd.readouterr().err
