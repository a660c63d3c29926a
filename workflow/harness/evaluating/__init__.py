"""Scoring of a trained model: lm-eval for accuracy, and the held-out loss of the reference answers."""
