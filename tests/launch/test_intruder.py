"""A job of this host is nobody else's: its sockets are on loopback, and another user gets into nothing of it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from moe_train.config import LaunchConfig
from moe_train.launch.local import launch

pytestmark = [pytest.mark.processes, pytest.mark.warm_start]


@pytest.mark.root
def test_another_user_of_this_host_gets_into_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # what connects a cluster's hosts does not count here
    results = launch("tests.launch.jobs:besieged", {}, LaunchConfig(processes=2, device="cpu"), tmp_path)
    for found in results:
        addresses = [ipaddress.ip_address(address) for address, _ in found["listening"]]
        assert len(addresses) >= 4, "each rank listens for the other one, in each of two groups"
        assert all(a.is_loopback or (a.version == 6 and a.ipv4_mapped and a.ipv4_mapped.is_loopback) for a in addresses)
    assert results[0]["did"] == []
    assert [(found["sums"], found["diagnosis"]) for found in results] == [([3.0, 6.0], None)] * 2
