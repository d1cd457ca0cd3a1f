"""State of each training process: its world, its progress marker, its stop signals."""
