"""What experts do: load, collapse, fluctuation, capacity; what layers cost; the report."""
