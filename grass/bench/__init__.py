"""Benchmark of GRASS itself: `python -m grass.bench`. It prints ratios measured in one run, and asserts nothing."""
