"""moe_train: sparse-expert (mixture-of-experts) models for multilingual translation."""

from __future__ import annotations

__version__ = "0.1.0"
