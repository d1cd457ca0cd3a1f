#!/usr/bin/env bash
# The claims of THOR, SMoE and SAM in small: translation in six languages at equal active compute, BLEU by tier.
# It can be interrupted and started again: finished runs are not repeated. Arguments: scripts/reproduce/translation.sh --help
#
# Where scripts/reproduce/study_commit names a commit, the full budget runs the package of that commit, in a work tree
# under outputs/, so that later changes of the code do not mix into the study.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

pinned=scripts/reproduce/study_commit
if [[ ! -f $pinned || " $* " == *" --budget small "* || " $* " == *" --budget gpu "* ]]; then
    exec .venv/bin/python scripts/reproduce/translation.py "$@"
fi
commit=$(<"$pinned")
tree=outputs/study/$commit
if [[ ! -d $tree ]]; then
    git worktree prune
    git worktree add --quiet --detach "$tree" "$commit"
fi
PYTHONPATH="$PWD/$tree" exec .venv/bin/python "$tree/scripts/reproduce/translation.py" "$@"
