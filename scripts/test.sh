#!/usr/bin/env bash
# Installs if need be, then checks the checkout.
#
#   scripts/test.sh                       ruff, mypy and the tests that start no process
#   scripts/test.sh --all                 ruff, mypy and everything but the slow tests, with coverage
#   scripts/test.sh tests/routing -x      other arguments go to pytest
#   scripts/test.sh -m slow               the long runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh

# Where a launcher's variables are around, a test would take itself for one of its ranks.
unset PYTHONPATH RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
export PATH="$PWD/.venv/bin:$PATH"
# Tests start several processes each: one thread apiece is fastest on few cores, and gives the same sums everywhere.
export OMP_NUM_THREADS=1

# Three workers, since some wait for Slurm, watchdogs and ranks; a file at a time, in the order of tests/conftest.py.
# More would only crowd each other's processes.
# ruff and mypy are tests/test_code_style.py.
workers=(--numprocesses=3 --dist=loadfile --no-loadscope-reorder)
if (($# == 0)); then
    set -- "${workers[@]}" -m "not slow and not processes"
elif [[ $1 == --all ]]; then
    shift
    set -- "${workers[@]}" --cov=moe_train --cov-report=term "$@"
fi
exec .venv/bin/python -m pytest -m "not slow" "$@"
