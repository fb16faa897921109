"""MiniMIG: a drawn world that mirrors MIG-Bench, small enough for a CPU."""
