"""Readers of corpora, a file each; importing this package registers them all."""

from __future__ import annotations

from moe_train.data.corpora import text
from moe_train.data.corpora.base import ParallelText, read_corpus, register

__all__ = ["ParallelText", "read_corpus", "register", "text"]
