"""Hosts on one machine: network namespaces on a bridge, each with its own interface. Needs root and iproute2.

    with Hosts(2) as hosts:
        hosts.cap("200mbit")
        hosts.start(0, ["python", "program.py"])

What leaves a host passes its ``eth0``, whose bytes the kernel counts and whose rate ``tbf`` can cap; what processes of
one host send each other passes its ``lo``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any


class Hosts:
    """``number`` hosts, made on entering and removed on leaving."""

    def __init__(self, number: int = 2, subnet: str = "10.213.7") -> None:
        tag = f"moe{os.getpid()}{secrets.token_hex(2)}"  # a process may have several sets
        self.hub = f"{tag}hub"
        self.names = [f"{tag}host{i}" for i in range(number)]
        self.addresses = [f"{subnet}.{i + 1}" for i in range(number)]

    @staticmethod
    def why_not() -> str | None:
        """Why this machine cannot make them; None where it can."""
        if os.geteuid():
            return "needs root"
        missing = [name for name in ("ip", "tc", "nsenter") if not shutil.which(name)]
        if missing:
            return f"needs the command {missing[0]} (iproute2, util-linux)"
        probe = f"moe{os.getpid()}probe"
        if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
            return "network namespaces cannot be made here"
        try:
            link = ["ip", "-n", probe, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
            if subprocess.run(link, capture_output=True, check=False).returncode:
                return "this kernel has no veth"
        finally:
            subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
        return None

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _run("ip", "netns", "add", self.hub)
        _run("ip", "-n", self.hub, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self.hub, "link", "set", "bridge0", "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            port = f"port{i}"
            _run("ip", "-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", self.hub, "link", "set", port, "master", "bridge0", "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for name in (*self.names, self.hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def cap(self, rate: str | None) -> None:
        """Limits the rate at which each host sends to others, such as ``200mbit``; None removes the limit."""
        for name in self.names:
            subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"], capture_output=True, check=False)
            if rate:
                limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit)

    def link(self, state: str) -> None:
        """Takes the last host's link ``down`` at the bridge, or ``up`` again; both ends keep their connections."""
        _run("ip", "-n", self.hub, "link", "set", f"port{len(self.names) - 1}", state)

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts a process on a host; gloo uses the host's interface."""
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **(environment or {})}
        inside = ["nsenter", f"--net=/run/netns/{self.names[host]}", "--", *command]
        return subprocess.Popen(inside, env=variables, text=True, **options)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
