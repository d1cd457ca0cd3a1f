"""Which interface a host that calls itself 127.0.1.1 takes to the others, on network hosts of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.network.hosts import two_hosts

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.network
PROGRAM = (
    "import os; from moe_train.launch.slurm import set_torchrun_env; set_torchrun_env(); "
    "print(os.environ['GLOO_SOCKET_IFNAME'])"
)
# What Slurm knows of the job: two nodes with their addresses.
SCONTROL = """#!/bin/sh
case "$2 $3" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show node") echo "NodeName=$4 NodeAddr=10.213.8.${4#n}" ;;
esac
"""


@pytest.fixture
def hosts() -> Iterator[Any]:
    """Two network hosts on a bridge, without a way to anywhere else."""
    with two_hosts("10.213.8") as made:
        yield made


def test_a_host_that_calls_itself_loopback(hosts: Any, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o755)
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.1.1"}
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    around = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLOO"))}

    def taken(**told: str) -> str:
        command = ["nsenter", f"--net=/run/netns/{hosts.names[0]}", "--", sys.executable, "-c", PROGRAM]
        environment = {**around, **place, "PYTHONPATH": str(ROOT), **told}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    assert taken() == "eth0"  # no default route, one interface
    for words in (
        "link add manage0 type veth peer name manage1",
        "addr add 192.168.7.1/24 dev manage0",
        "link set manage0 up",
        "link set manage1 up",
        "route add default via 192.168.7.254",
    ):
        subprocess.run(["ip", "-n", hosts.names[0], *words.split()], check=True)
    assert taken() == "manage0"  # the way out, for want of better knowledge
    assert taken(**slurm) == "eth0"  # the way to the other node
