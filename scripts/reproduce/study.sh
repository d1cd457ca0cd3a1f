#!/usr/bin/env bash
# Runs all stages of the translation study, with one process of one thread on every core. Stop it at any time; the same
# command trains only what results/ does not hold.
#
#   scripts/reproduce/study.sh DATA [CORES]      DATA: a folder of moe-prepare, as docs/results.md makes `six`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=${1:?usage: scripts/reproduce/study.sh DATA [CORES]}
cores=${2:-$(nproc)}

stages() {
    for stage in "$@"; do
        scripts/reproduce/translation.sh --data "$data" --stage "$stage" --threads 1
    done
}

side_by_side() {
    local processes=()
    for ((core = 0; core < cores; core++)); do
        stages "$@" &
        processes+=($!)
        sleep 5 # the first one makes the work tree
    done
    for process in "${processes[@]}"; do
        wait "$process"
    done
}

trap 'trap - TERM; kill 0' INT TERM
side_by_side a # its balance weights are needed by the others
side_by_side b c d
