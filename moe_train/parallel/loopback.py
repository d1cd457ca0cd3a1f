"""Environment of processes that all stand on one host."""

from __future__ import annotations

# gloo and NCCL listen on the loopback interface only, whatever connects this host to others.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
