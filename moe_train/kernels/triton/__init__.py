"""Triton kernels of the sparse layer. Only :mod:`moe_train.kernels.device_kernels` imports them: triton is optional."""
