"""Cleaning of training text: menders change a sentence, filters drop a pair; each is counted by name."""

from __future__ import annotations

from moe_train.data.cleaning.cleaner import CleanBlock, Cleaner, clean_block

__all__ = ["CleanBlock", "Cleaner", "clean_block"]
