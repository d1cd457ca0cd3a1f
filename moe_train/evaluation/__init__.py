"""Beam search, BLEU and chrF++ with significance, loading a trained run, translating text."""
