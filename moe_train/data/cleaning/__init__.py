"""Cleaning of training text: normalizers change a sentence, filters drop a pair; both are counted by name."""

from __future__ import annotations

from moe_train.data.cleaning.cleaner import CleanBlock, Cleaner, clean_block

__all__ = ["CleanBlock", "Cleaner", "clean_block"]
