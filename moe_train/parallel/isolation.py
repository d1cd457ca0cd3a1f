"""Environment variables that protect a job from other users of the host. Needs no torch."""

from __future__ import annotations

# For jobs on one host: gloo and NCCL listen on the loopback interface only.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# Secret shared by the ranks of a job; authenticates ranks, and the job's entries in a store that others can write to.
SECRET = "MOE_TRAIN_SECRET"
