#!/usr/bin/env bash
# Trains on MIN to MAX hosts: when processes or hosts are lost, the remaining ones resume from the last checkpoint.
# Run the same command on each host, from the same folder of a shared file system. The host of HEAD must not be lost.
#
#   NNODES=1:2 HEAD=node1:29400 JOB=wmt-sam scripts/torchrun/elastic.sh data=data-bin/mine routing=sam layout=expert_parallel
#
# MAX_RESTARTS  how often processes are restarted (3); a lost host needs one or two
# LOST_AFTER    seconds without a sign of life after which a host counts as lost (10): longer than interruptions of the network
# A host that disappears without closing its connections is found by launch.silent_minutes, here 2.
# JOB, NPROC, LOCAL: see multi_node.sh. A layout with a number of ranks (layout.expert_parallel=2) needs that many;
# layout=expert_parallel uses all ranks.
set -euo pipefail

: "${LOST_AFTER:=10}"
rdzv=join_timeout=600,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=$(((LOST_AFTER + 1) / 2))
export MAX_RESTARTS="${MAX_RESTARTS:-3}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}"
# torchrun also reads each option from PET_… (--rdzv-conf, --monitor-interval).
PET_RDZV_CONF=$rdzv PET_MONITOR_INTERVAL=0.5 exec "$(dirname "${BASH_SOURCE[0]}")/multi_node.sh" \
    training.checkpoint.damaged=skip launch.silent_minutes=2 "$@"
