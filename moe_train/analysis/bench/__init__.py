"""moe-bench: how fast sparse layers are on this machine."""
