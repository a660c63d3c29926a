"""Keeps optimizer states of sleeping layers on the host; copies overlap with computation."""
