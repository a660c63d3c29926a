"""Forecasts the peak memory of a fine-tuning step without a GPU: runs the real code on tensors without values."""
