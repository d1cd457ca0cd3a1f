"""Statistics of the sparse blocks of a trained model on held-out data."""

from __future__ import annotations

from moe_train.analysis.probe.probing import probe_run

__all__ = ["probe_run"]
