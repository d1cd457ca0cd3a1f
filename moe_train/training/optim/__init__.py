"""Optimizer, learning rate, precision, and the norm of the gradient."""
