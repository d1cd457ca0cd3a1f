#!/usr/bin/env bash
# Soft MoE's inference time from 4 to 64 experts at a fixed number of slots. Arguments: --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec .venv/bin/python scripts/reproduce/soft_moe_experts.py "$@"
