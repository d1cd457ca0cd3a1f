"""What Hydra finds of ours when it looks for plugins."""
