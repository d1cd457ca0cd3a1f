#!/usr/bin/env bash
# From a fresh clone to a trained multilingual sparse model, its scores and its report: at most ten minutes on two cores.
# Arguments are passed to moe-train. Run it again to resume: finished stages are not repeated, and existing scores are
# shown.
#
#   scripts/quickstart.sh routing=top_k seed=2
#   RUN=outputs/mine scripts/quickstart.sh routing=dense
#
# RUN     the run folder (outputs/quickstart), as run= or hydra.run.dir= among the arguments; use another one for other settings
# DATA    the data folder, made unless it exists (data-bin/quickstart)
# PYTHON  the interpreter for .venv, see scripts/setup.sh
# XDG_CACHE_HOME/moe_train/wheels (~/.cache) caches the 90 MB of wheels with the text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=${DATA:-data-bin/quickstart}
run=${RUN:-outputs/quickstart}
for word in "$@"; do
    [[ $word == hydra.run.dir=* || $word == run=* ]] && run=${word#*=} # as the error for other settings suggests
done
precision=fp32
grep -qsw amx_bf16 /proc/cpuinfo && precision=bf16 # matrix units: twice as fast
summary=()

stage() {
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    summary+=("$(printf '%-10s %4d s' "$name" $((SECONDS - started)))")
}

stage install scripts/setup.sh --minimal
export PATH="$PWD/.venv/bin:$PATH"
stage prepare moe-prepare corpus=l10n "corpus.languages=[de,fr,ja,ko,ru]" out="$data"
resume=auto
[[ -f $run/config.json ]] && resume=must # resumes, and does nothing where the run is finished
stage train moe-train data="$data" experiment=quickstart training.precision=$precision launch.processes=2 \
    resume=$resume hydra.run.dir="$run" "$@"
if [[ $run/test.json -nt $run/run.json ]]; then # written by every session of training
    stage scores moe-report "runs=[$run]" html=false
else
    stage evaluate moe-evaluate run="$run" split=test launch.processes=2 examples=6
    stage report moe-report "runs=[$run]"
fi

printf '\n== done in %d s; the run folder is %s, the report %s/report.html\n' "$SECONDS" "$run" "$run"
printf '%s\n' "${summary[@]}"
