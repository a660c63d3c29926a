"""The memory that a card must have for a forecast: more than the tensors that are alive."""

from __future__ import annotations

from harness.records.units import GIB

CONTEXT_BYTES = round(0.6 * GIB)
"""Device memory of a process beyond its tensors: the CUDA context of an H100 takes 0.4 to 0.6 GiB."""
OVERHEAD_FACTOR = 1.04
"""Factor for fragmentation and buffers inside kernels: an allocator's peak is 1 to 4 % above the live storages."""


def needed_bytes(peak_bytes: int) -> int:
    """Memory in bytes that a card must have for a forecast peak."""
    return round(peak_bytes * OVERHEAD_FACTOR) + CONTEXT_BYTES
