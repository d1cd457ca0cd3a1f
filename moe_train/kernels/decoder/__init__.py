"""Kernels of beam search on CPUs: a decoder's step, and the best continuations."""
