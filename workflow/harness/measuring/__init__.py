"""Clocks, memory meters and provenance."""
