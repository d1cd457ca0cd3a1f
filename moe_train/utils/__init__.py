"""Utilities: files, JSON, processes. Standard library only."""
