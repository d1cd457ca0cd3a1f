#!/usr/bin/env bash
# All strategies on one GPU, in calls of at most nine minutes; the same call continues where the last one stopped. Two calls
# give the table of the first round, further calls longer runs.
#
#   scripts/reproduce/on_gpu.sh --data DATA [--results DIR] [--minutes 8.5]
#
# DATA of at most 50 MB: moe-prepare corpus=text corpus.path=TEXT corpus.max_pairs=50000 vocabulary.size=8000 out=DATA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=.venv/bin/python
[[ -x $python ]] || python=python3 # a machine that has torch and the package in its own Python
exec "$python" scripts/reproduce/on_gpu.py "$@"
