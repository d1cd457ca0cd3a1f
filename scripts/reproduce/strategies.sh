#!/usr/bin/env bash
# Trains every strategy with the same budget in one sweep: six languages in both directions, the tiny model, the same updates and batches.
#
#   scripts/reproduce/strategies.sh TEXT_FOLDER [OUT] [OVERRIDE ...]      overrides are passed to moe-train
#
# TEXT_FOLDER contains {train,valid,test}.en-XX.{en,XX} of the six languages. Run it again to resume: finished runs are not
# repeated. OUT (outputs/strategies) gets one run folder per strategy and the leaderboard. A run takes two minutes of one
# core, THOR four.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

text=${1:?usage: scripts/reproduce/strategies.sh TEXT_FOLDER [OUT] [OVERRIDE ...]}
out=${2:-outputs/strategies}
shift $(($# < 2 ? $# : 2))
data=$out/data
strategies=dense,switch,top_k,expert_choice,hash,random,thor,smoe,xmoe,sam,soft_moe
budget=(
    model=tiny seed=1 launch.processes=1 training.threads=1
    training.max_updates=220 training.tokens_per_update=1024 training.log_every=20
    training.optimizer.lr=0.002 training.schedule.name=linear training.schedule.warmup_updates=40
    training.validation.every_updates=55 training.validation.max_sentences=20
    training.checkpoint.every_updates=110 training.checkpoint.keep=1
)

export PATH="$PWD/.venv/bin:$PATH"
moe-prepare corpus=text corpus.path="$text" 'corpus.languages=[ar,de,fr,ru,tr,zh]' vocabulary.size=8000 out="$data"
# Hydra resolves the subfolder.
# shellcheck disable=SC2016
moe-train -m data="$data" routing=$strategies "${budget[@]}" \
    hydra.sweep.dir="$out/runs" 'hydra.sweep.subdir=${hydra:runtime.choices.routing}' "$@"
for run in "$out"/runs/*/; do
    [[ -f $run/test.first-50.json ]] && continue
    moe-evaluate run="$run" split=test checkpoint=last max_sentences=50 search.beam=4 launch.processes=2
done
moe-report "runs=[$out/runs]" part=first-50 baseline="$out/runs/switch" out="$out"
