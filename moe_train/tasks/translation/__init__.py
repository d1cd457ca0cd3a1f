"""Multilingual translation, in moe-train and on fairseq's own command lines."""
