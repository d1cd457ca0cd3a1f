"""Readers of corpora, one per file; importing this package registers all of them."""

from __future__ import annotations

from moe_train.data.corpora import flores200, iwslt14, l10n, mono, opus100, text
from moe_train.data.corpora.base import CorpusText, read_corpus, register

__all__ = ["CorpusText", "flores200", "iwslt14", "l10n", "mono", "opus100", "read_corpus", "register", "text"]
