"""Meters of memory, the clock of steps, and the lease on a GPU."""
