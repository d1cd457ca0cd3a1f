#!/usr/bin/env bash
# Makes an environment with wandb and mlflow, for tests/training/metrics/test_loggers.py. It also sees the packages of .venv.
#
#   scripts/logger_environment.sh outputs/loggers
#   MOE_TRAIN_LOGGERS_PYTHON=$PWD/outputs/loggers/bin/python pytest -m slow tests/training/metrics/test_loggers.py
set -euo pipefail
(($# == 1)) || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$checkout/.venv/bin/python" -m venv "$1"
printf "import site; site.addsitedir('%s')\n" "$(site "$checkout/.venv/bin/python")" >"$(site "$1/bin/python")/checkout.pth"
"$checkout/.venv/bin/python" -c 'import sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
print(*extras["wandb"], *extras["mlflow"], sep="\n")' "$checkout/pyproject.toml" >"$1/requirements.txt"
"$1/bin/python" -m pip --disable-pip-version-check install --quiet --requirement "$1/requirements.txt"
