"""Reads rank, world size and job state from Slurm and submitit.

torch.distributed reads torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR …). For a task of ``srun`` they are derived
from Slurm's variables, for one of submitit's local executor from submitit's. Does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping

from moe_train.errors import LaunchError
from moe_train.launch.job.env import env_number, under_launcher
from moe_train.launch.job.network import interface_between_hosts, interface_towards

_FIRST_PORT, _PORTS = 20000, 12000  # below the kernel's range of ephemeral ports
_JOBS = 2**40  # above any job number
_TRIES, _TIMEOUT = 4, 15.0  # seconds each, for a busy controller


def check_slurm() -> None:
    """Checks that jobs can be submitted from this host.

    Raises:
        LaunchError: Slurm's commands are not found.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"there is no Slurm on this host ({' and '.join(missing)} not found on PATH)",
            "hydra/launcher=submitit_slurm",
            "start on a host of the cluster, or take hydra/launcher=submitit_local",
        )


def set_torchrun_env() -> None:
    """Sets torchrun's variables where this process is one task of several, unless torchrun has set them.

    MASTER_ADDR and MASTER_PORT are kept where they are set. GLOO_SOCKET_IFNAME is kept, or set (also under torchrun) to
    the interface that reaches MASTER_ADDR: gloo would use the one that the host's name resolves to, if any.

    Raises:
        LaunchError: Slurm does not tell the address of the first task, or a variable has an invalid value.
    """
    variables = {} if under_launcher() else _task_of_slurm(os.environ) or _task_of_submitit(os.environ) or {}
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    os.environ.update({**variables, **given})
    unset = under_launcher() and "MASTER_ADDR" in os.environ and "GLOO_SOCKET_IFNAME" not in os.environ
    if unset and (name := _interface(os.environ)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface(environment: Mapping[str, str]) -> str | None:
    """The interface for gloo."""
    one_host = environment.get("LOCAL_WORLD_SIZE") in (None, environment.get("WORLD_SIZE"))
    host = environment["MASTER_ADDR"]
    return interface_towards(host) if one_host else interface_between_hosts(host, _another_node(environment))


def _another_node(environment: Mapping[str, str]) -> Iterator[str]:
    """The address of another node of this step, where Slurm knows one."""
    try:
        nodes = node_names(environment["SLURM_STEP_NODELIST"]) if "SLURM_STEP_NODELIST" in environment else []
        others = [node for node in nodes if node != environment.get("SLURMD_NODENAME")]
        found = [node_address(node) for node in others[:1]]
    except LaunchError:  # then the default route is used
        return
    yield from found


def _task_of_slurm(environment: Mapping[str, str]) -> dict[str, str] | None:
    """None for a batch script or an interactive shell: it is not one task of several, whatever its job's resources."""
    if "SLURM_STEP_NUM_TASKS" not in environment or env_number(environment, "SLURM_STEP_NUM_TASKS") < 2:
        return None
    node, tasks = (
        env_number(environment, "SLURM_NODEID"),
        tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "")),
    )
    if "SLURM_STEP_NODELIST" not in environment or node >= len(tasks):
        raise LaunchError(
            "SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE do not give this task's node",
            f"SLURM_NODEID={node}",
            "start with srun, which sets these variables",
        )
    address = environment.get("MASTER_ADDR") or node_address(node_names(environment["SLURM_STEP_NODELIST"])[0])
    number = env_number(environment, "SLURM_JOB_ID", most=_JOBS) * 16 + env_number(
        environment, "SLURM_STEP_ID", most=_JOBS
    )
    return {
        "RANK": str(env_number(environment, "SLURM_PROCID")),
        "WORLD_SIZE": str(env_number(environment, "SLURM_STEP_NUM_TASKS")),
        "LOCAL_RANK": str(env_number(environment, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(tasks[node]),
        "MASTER_ADDR": address,
        "MASTER_PORT": _port(number),
    }


def _task_of_submitit(environment: Mapping[str, str]) -> dict[str, str] | None:
    """submitit's local executor: ``tasks_per_node`` processes of one host."""
    if environment.get("SUBMITIT_EXECUTOR") != "local" or environment.get("SUBMITIT_LOCAL_NTASKS", "1") == "1":
        return None
    tasks = str(env_number(environment, "SUBMITIT_LOCAL_NTASKS", least=1))
    return {
        "RANK": str(env_number(environment, "SUBMITIT_LOCAL_GLOBALID")),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": str(env_number(environment, "SUBMITIT_LOCAL_LOCALID")),
        "LOCAL_WORLD_SIZE": tasks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(env_number(environment, "SUBMITIT_LOCAL_JOB_ID", most=_JOBS)),
    }


def _port(number: int) -> str:
    """The same port for all tasks of a job, and another one for the next jobs."""
    return str(_FIRST_PORT + number % _PORTS)


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's short form: ``2(x3),1`` is ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def node_names(nodes: str) -> list[str]:
    """Expands a node list such as ``n[1-3,7]``.

    Raises:
        LaunchError: scontrol is not found or does not answer.
    """
    return _scontrol("show", "hostnames", nodes).split()


def node_address(node: str) -> str:
    """The address of a node, whose name need not resolve.

    Raises:
        LaunchError: scontrol is not found or does not answer.
    """
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
    return found.group(1) if found else node


def own_job() -> str:
    """The job of this process, for scontrol.

    In an array it is ``JOB_TASK``: the number alone means the whole array, and is also the own number of one element.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def job_state(job: str) -> str:
    """``RUNNING``, also while a preempted job has time to save; ``CANCELLED``, ``COMPLETING`` … once Slurm ends it.

    Calls scontrol once, since a process that is to end has little time.

    Raises:
        LaunchError: scontrol is not found or does not answer.
    """
    found = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job, tries=1))
    return found.group(1) if found else "UNKNOWN"


def _scontrol(*words: str, tries: int = _TRIES) -> str:
    command = ["scontrol", "--oneliner", *words]
    for left in reversed(range(tries)):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
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
    """Whether this process belongs to a Slurm array job."""
    return "SLURM_ARRAY_TASK_ID" in os.environ
