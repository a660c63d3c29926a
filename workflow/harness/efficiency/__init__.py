"""Memory and speed of methods on models of true size with random weights: one cell, forecast or run."""
