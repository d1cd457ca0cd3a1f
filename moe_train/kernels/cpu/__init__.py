"""CPU kernels: matrix products, segment sums, dropout, memory and threads."""
