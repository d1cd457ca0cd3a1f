#!/usr/bin/env bash
# Trains on all GPUs of this host, or in NPROC processes, under torchrun.
#
#   scripts/torchrun/single_node.sh data=data-bin/l10n routing=switch
#   NPROC=2 scripts/torchrun/single_node.sh data=data-bin/l10n routing=switch launch.device=cpu
#
# MAX_RESTARTS (0): how often the processes are restarted when one is lost; they resume from the last checkpoint.
set -euo pipefail

gpus() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1; }

# Signs what ranks write to torchrun's store, which other users of this host may reach.
export MOE_TRAIN_SECRET=${MOE_TRAIN_SECRET:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')}

exec torchrun --standalone --nproc-per-node="${NPROC:-$(gpus)}" --max-restarts="${MAX_RESTARTS:-0}" \
    -m moe_train.commands.train "$@"
