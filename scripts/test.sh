#!/usr/bin/env bash
# Installs if need be, then runs the tests. Arguments go to pytest.
#
#   scripts/test.sh                       the fast suite, with the coverage of moe_train (at least 85 % of its lines)
#   scripts/test.sh tests/routing -x      a part of it, without coverage
#   scripts/test.sh -m slow               the long runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh

# Where a launcher's variables are around, a test would take itself for one of its ranks.
unset PYTHONPATH RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
export PATH="$PWD/.venv/bin:$PATH"
# Tests start several processes each: one thread apiece is fastest on few cores, and gives the same sums everywhere.
export OMP_NUM_THREADS=1

if (($# == 0)); then
    # Two workers, a file at a time, in the order of tests/conftest.py: more would only crowd each other's processes.
    set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder --cov=moe_train --cov-report=term
fi
exec .venv/bin/python -m pytest -m "not slow" "$@"
