#!/usr/bin/env bash
# Trains on several hosts under torchrun: run the same command on each of them, from the same folder of a shared file system.
#
#   NNODES=4 HEAD=node1:29400 JOB=wmt-sam scripts/torchrun/multi_node.sh data=data-bin/mine model=base routing=sam
#
# HEAD   host:port of one of the hosts, which the others can reach, for the rendezvous
# JOB    unique name of this job, the same on all hosts
# NPROC  processes on each host (all GPUs)
# LOCAL  address of this host, if its name does not resolve
# MOE_TRAIN_SECRET  at least 16 characters, the same on all hosts: signs what ranks write to torchrun's store
#        (docs/faults.md); unset: rank 0 draws one after the rendezvous
# NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME  the interface, if a host has several (docs/faults.md)
set -euo pipefail

: "${NNODES:?number of hosts}" "${HEAD:?host:port of the rendezvous}" "${JOB:?unique name of this job}"
gpus() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1; }
options=()
[[ -z ${LOCAL:-} ]] || options+=(--local-addr="$LOCAL")

exec torchrun --nnodes="$NNODES" --nproc-per-node="${NPROC:-$(gpus)}" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="$JOB" "${options[@]}" -m moe_train.commands.train "$@"
