"""Environment variables that keep other users of a host out of a job. Needs no torch."""

from __future__ import annotations

# For processes that all stand on one host: gloo and NCCL listen on its loopback interface only.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# Shared by the ranks of a job: by it they know one another, and what is theirs in a store that others can write to.
SECRET = "MOE_TRAIN_SECRET"
