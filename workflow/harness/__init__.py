"""The shared bench: it asks methods for nothing but the contract in `baselines.method`, and measures what they do."""
