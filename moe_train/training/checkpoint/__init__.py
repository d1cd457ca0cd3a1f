"""Checkpoints: their files, checksums and names, when they are written, and weights to start from."""
