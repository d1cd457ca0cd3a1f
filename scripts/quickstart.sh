#!/usr/bin/env bash
# From a fresh clone to a trained multilingual sparse model and its table of scores: a quarter of an hour on two cores.
# Arguments go to moe-train, for example `scripts/quickstart.sh routing=top_k seed=2`. Run it again to go on where it
# was stopped. With other settings, give another run folder: `RUN=outputs/mine scripts/quickstart.sh routing=dense`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=${DATA:-data-bin/l10n}
run=${RUN:-outputs/quickstart}
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
stage prepare moe-prepare corpus=l10n out="$data"
resume=auto
[[ -f $run/config.json ]] && resume=must # goes on, and has nothing to do where the run is finished
stage train moe-train data="$data" experiment=quickstart launch.processes=2 resume=$resume hydra.run.dir="$run" "$@"
stage evaluate moe-evaluate run="$run" split=test launch.processes=2

printf '\n== done in %d s; the run folder is %s\n' "$SECONDS" "$run"
printf '%s\n' "${summary[@]}"
