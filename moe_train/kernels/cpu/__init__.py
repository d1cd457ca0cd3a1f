"""For CPUs: products, segment sums, dropout, memory and threads."""
