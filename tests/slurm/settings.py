"""What the test cluster is told: slurm.conf, the commands on PATH, and who ends the daemons if nobody else does."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

CONTROLLER = "10.213.7.254"
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")

_CONF = """\
ClusterName=tests
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
InactiveLimit=0
KillWait=30
MinJobAge=3600
MessageTimeout=60
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes={names} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

# Slurm answers sacct from its accounting database. Without one, what submitit asks for is read from scontrol.
_SACCT = """#!/usr/bin/env python3
import subprocess, sys
print("JobID|State|NodeList")
for job in [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "-j"]:
    shown = subprocess.run(["{folder}/bin/scontrol", "-o", "show", "job", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = fields["JobId"]
        if "ArrayJobId" in fields:
            task = fields["ArrayTaskId"]
            name = fields["ArrayJobId"] + "_" + (task if task.isdigit() else f"[{{task}}]")
        nodes = fields.get("NodeList", "")
        print(name, fields["JobState"], "None assigned" if nodes in ("", "(null)") else nodes, sep="|")
"""

# Inside a job the command is run where it is; outside in the namespace where slurmctld can be reached.
_COMMAND = """#!/bin/sh
export SLURM_CONF={folder}/slurm.conf
[ -n "$SLURM_JOB_ID" ] && exec {command} "$@"
exec nsenter --net=/run/netns/{hub} {command} "$@"
"""


def write_settings(folder: Path, nodes: Sequence[str], addresses: Sequence[str], cpus: int, hub: str) -> None:
    """slurm.conf, munge's key, and the commands in ``folder/bin``."""
    for name in ("state", "bin", *(f"spool.{node}" for node in nodes)):
        folder.joinpath(name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    lines = [
        f"NodeName={node} NodeHostname={node} NodeAddr={address} Port=6818 CPUs={cpus} RealMemory=4000 State=UNKNOWN"
        for node, address in zip(nodes, addresses, strict=True)
    ]
    values = {"folder": folder, "host": os.uname().nodename, "controller": CONTROLLER, "port": _free_port()}
    conf = _CONF.format(**values, nodes="\n".join(lines), names=",".join(nodes))
    folder.joinpath("slurm.conf").write_text(conf)
    programs = {name: _COMMAND.format(folder=folder, hub=hub, command=shutil.which(name)) for name in COMMANDS}
    programs["sacct"] = _SACCT.format(folder=folder)
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


def _free_port() -> int:
    """Below the ephemeral range, where the kernel might hand a closed port out again."""
    while True:
        port = random.randint(15000, 31000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
