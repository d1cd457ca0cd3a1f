"""Trained models in use: the Python interface, moe-translate, and the experts of tokens."""
