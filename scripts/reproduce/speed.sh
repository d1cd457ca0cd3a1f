#!/usr/bin/env bash
# Measures words per second of every strategy in training, one after the other on an otherwise idle machine: fifteen updates each.
#
#   scripts/reproduce/speed.sh DATA [OUT] [OVERRIDE ...]      DATA: a folder of moe-prepare; overrides are passed to moe-train
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=${1:?usage: scripts/reproduce/speed.sh DATA [OUT] [OVERRIDE ...]}
out=${2:-outputs/speed}
shift $(($# < 2 ? $# : 2))

export PATH="$PWD/.venv/bin:$PATH"
# Hydra resolves the subfolder.
# shellcheck disable=SC2016
moe-train -m data="$data" routing=dense,switch,top_k,expert_choice,hash,random,thor,smoe,xmoe,sam,soft_moe \
    model=tiny training.max_updates=15 training.tokens_per_update=2048 training.log_every=5 \
    training.validation.every_updates=15 training.validation.max_sentences=1 \
    hydra.sweep.dir="$out" 'hydra.sweep.subdir=${hydra:runtime.choices.routing}' "$@"
moe-report "runs=[$out]" out="$out"
