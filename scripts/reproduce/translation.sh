#!/usr/bin/env bash
# The claims of THOR, SMoE and SAM in small: translation in six languages at equal active compute, BLEU by tier.
# It can be interrupted and started again: finished runs are not repeated. Arguments: scripts/reproduce/translation.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec .venv/bin/python scripts/reproduce/translation.py "$@"
