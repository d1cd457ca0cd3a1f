"""Hydra plugins of moe_train."""
