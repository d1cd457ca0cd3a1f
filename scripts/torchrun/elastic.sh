#!/usr/bin/env bash
# Trains on MIN to MAX hosts: when processes or hosts are lost, those that are left go on from the last checkpoint.
# Run the same line on each host, from the same folder of a shared file system. The host of HEAD must not be lost.
#
#   NNODES=1:2 HEAD=node1:29400 JOB=wmt-sam scripts/torchrun/elastic.sh data=data-bin/mine routing=sam layout=expert_parallel
#
# MAX_RESTARTS  how often processes are started again (3); a lost host costs one or two
# LOST_AFTER    seconds of silence after which a host is given up (10): longer than the breaks your network has
# A host that vanishes without closing its connections is found by launch.silent_minutes, here 2.
# JOB, NPROC, LOCAL: see multi_node.sh. A layout that counts ranks (layout.expert_parallel=2) cannot shrink below them;
# layout=expert_parallel takes as many as there are.
set -euo pipefail

: "${LOST_AFTER:=10}"
rdzv=join_timeout=600,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=$(((LOST_AFTER + 1) / 2))
export MAX_RESTARTS="${MAX_RESTARTS:-3}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}"
# torchrun takes each option from PET_… too (--rdzv-conf, --monitor-interval).
PET_RDZV_CONF=$rdzv PET_MONITOR_INTERVAL=0.5 exec "$(dirname "${BASH_SOURCE[0]}")/multi_node.sh" \
    training.checkpoint.damaged=skip launch.silent_minutes=2 "$@"
