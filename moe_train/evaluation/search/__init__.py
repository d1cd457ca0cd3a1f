"""Beam search with the semantics of fairseq's SequenceGenerator."""
