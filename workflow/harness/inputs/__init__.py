"""Inputs of runs: rows, tokens, models, each with its hash and with counts of truncated or dropped rows."""
