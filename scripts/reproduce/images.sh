#!/usr/bin/env bash
# Soft MoE, token choice, expert choice and dense on images, at equal FLOPs.
# It can be interrupted and started again: finished runs are not repeated. Arguments: scripts/reproduce/images.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec .venv/bin/python scripts/reproduce/images.py "$@"
