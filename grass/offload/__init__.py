"""Optimizer states of sleeping layers on the host, moved behind the computation."""
