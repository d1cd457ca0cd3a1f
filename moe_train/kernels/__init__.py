"""Optional speed: kernels that know tensors, counts and numbers only. torch suffices without them."""
