"""Expert parallelism: layouts, dispatch and combine of tokens, gradient reduction, traffic counters. Torch only."""

from __future__ import annotations
