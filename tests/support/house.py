"""Where the project and the shared folder beside it lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project."""
SHARED = ROOT.parent / "shared"
"""Benchmark data and small models; tests that want it skip where it is absent."""
