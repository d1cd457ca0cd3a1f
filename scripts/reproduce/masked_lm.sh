#!/usr/bin/env bash
# X-MoE in small: masked language models of many languages, then zero-shot classification, routing frozen or not.
# It can be interrupted and started again: finished runs are not repeated. Arguments: scripts/reproduce/masked_lm.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec .venv/bin/python scripts/reproduce/masked_lm.py "$@"
