"""Trained models in use: translation of standard input and at a prompt."""
