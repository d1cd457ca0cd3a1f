"""What Slurm and submitit tell a process about its job: its place among the ranks, and whether the job still runs.

torch.distributed reads torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR …). A task of ``srun`` finds the same facts
in Slurm's variables, one of submitit's local executor in submitit's. Needs no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping

from moe_train.errors import LaunchError
from moe_train.launch.job.env import told_number, under_launcher
from moe_train.launch.job.network import interface_between_hosts, interface_towards

_FIRST_PORT, _PORTS = 20000, 12000  # below the range from which kernels hand out ports
_JOBS = 2**40  # more than any job's number
_TRIES, _PATIENCE = 4, 15.0  # seconds each, for a controller that is busy


def check_slurm() -> None:
    """Refuses a host from which nothing can be submitted.

    Raises:
        LaunchError: Slurm's commands are not there.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"there is no Slurm on this host ({' and '.join(missing)} not found on PATH)",
            "hydra/launcher=submitit_slurm",
            "start on a host of the cluster, or take hydra/launcher=submitit_local",
        )


def set_torchrun_env() -> None:
    """Where this process is one task of several, sets torchrun's variables, unless torchrun has.

    MASTER_ADDR and MASTER_PORT stay as they are where they are set. GLOO_SOCKET_IFNAME, under torchrun too, stays or
    becomes the interface that reaches MASTER_ADDR: gloo would take the one that the host's name resolves to, if any.

    Raises:
        LaunchError: Slurm does not say where the first task is, or a variable says what cannot be.
    """
    place = {} if under_launcher() else _task_of_slurm(os.environ) or _task_of_submitit(os.environ) or {}
    met = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    os.environ.update({**place, **met})
    unsaid = under_launcher() and "MASTER_ADDR" in os.environ and "GLOO_SOCKET_IFNAME" not in os.environ
    if unsaid and (name := _interface(os.environ)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(told: Mapping[str, str]) -> str | None:
    """The interface for gloo."""
    one_host = told.get("LOCAL_WORLD_SIZE") in (None, told.get("WORLD_SIZE"))
    host = told["MASTER_ADDR"]
    return interface_towards(host) if one_host else interface_between_hosts(host, _another_node(told))


def _another_node(told: Mapping[str, str]) -> Iterator[str]:
    """The address of another node of this step, where Slurm knows one."""
    try:
        nodes = node_names(told["SLURM_STEP_NODELIST"]) if "SLURM_STEP_NODELIST" in told else []
        others = [node for node in nodes if node != told.get("SLURMD_NODENAME")]
        found = [node_address(node) for node in others[:1]]
    except LaunchError:  # then the default route must do
        return
    yield from found


def _task_of_slurm(told: Mapping[str, str]) -> dict[str, str] | None:
    """A batch script or an interactive shell is no task of several, whatever its job has been given."""
    if "SLURM_STEP_NUM_TASKS" not in told or told_number(told, "SLURM_STEP_NUM_TASKS") < 2:
        return None
    node, tasks = told_number(told, "SLURM_NODEID"), tasks_per_node(told.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if "SLURM_STEP_NODELIST" not in told or node >= len(tasks):
        raise LaunchError(
            "SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE do not say where this task stands",
            f"SLURM_NODEID={node}",
            "start with srun, and leave these variables to it",
        )
    address = told.get("MASTER_ADDR") or node_address(node_names(told["SLURM_STEP_NODELIST"])[0])
    number = told_number(told, "SLURM_JOB_ID", most=_JOBS) * 16 + told_number(told, "SLURM_STEP_ID", most=_JOBS)
    return {
        "RANK": str(told_number(told, "SLURM_PROCID")),
        "WORLD_SIZE": str(told_number(told, "SLURM_STEP_NUM_TASKS")),
        "LOCAL_RANK": str(told_number(told, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(tasks[node]),
        "MASTER_ADDR": address,
        "MASTER_PORT": _port(number),
    }


def _task_of_submitit(told: Mapping[str, str]) -> dict[str, str] | None:
    """submitit's local executor: ``tasks_per_node`` processes of one host."""
    if told.get("SUBMITIT_EXECUTOR") != "local" or told.get("SUBMITIT_LOCAL_NTASKS", "1") == "1":
        return None
    tasks = str(told_number(told, "SUBMITIT_LOCAL_NTASKS", least=1))
    return {
        "RANK": str(told_number(told, "SUBMITIT_LOCAL_GLOBALID")),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": str(told_number(told, "SUBMITIT_LOCAL_LOCALID")),
        "LOCAL_WORLD_SIZE": tasks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(told_number(told, "SUBMITIT_LOCAL_JOB_ID", most=_JOBS)),
    }


def _port(number: int) -> str:
    """The same for all tasks of a job, and another for its neighbours."""
    return str(_FIRST_PORT + number % _PORTS)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: ``2(x3),1`` is ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def node_names(nodes: str) -> list[str]:
    """All of ``n[1-3,7]``.

    Raises:
        LaunchError: scontrol is not there or does not answer.
    """
    return _scontrol("show", "hostnames", nodes).split()


def node_address(node: str) -> str:
    """Where a node can be reached: its name need not resolve.

    Raises:
        LaunchError: scontrol is not there or does not answer.
    """
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
    return found.group(1) if found else node


def own_job() -> str:
    """This process's job, for scontrol.

    An array's number alone means all of its elements, and one of them has that number for its own.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def job_state(job: str) -> str:
    """``RUNNING``, also while a preempted job has time to save; ``CANCELLED``, ``COMPLETING`` … once Slurm ends it.

    Asks once, since whoever is to leave has little time.

    Raises:
        LaunchError: scontrol is not there or does not answer.
    """
    found = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job, tries=1))
    return found.group(1) if found else "UNKNOWN"


def _scontrol(*words: str, tries: int = _TRIES) -> str:
    command = ["scontrol", "--oneliner", *words]
    for left in reversed(range(tries)):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            if not left or isinstance(error, OSError):
                raise LaunchError(
                    f"Slurm's scontrol does not answer ({error})",
                    f"scontrol {' '.join(words)}",
                    "export MASTER_ADDR and MASTER_PORT in the job's script, or put scontrol on its PATH",
                ) from error
            time.sleep(1)
    raise AssertionError(f"{tries} tries")


def is_array_job() -> bool:
    """Whether this process belongs to one job of an array of Slurm."""
    return "SLURM_ARRAY_TASK_ID" in os.environ
