"""What every process of a training has: its world, its stop signal, its progress marker."""
