"""Memory and speed of methods on full-size models with random weights, cell by cell: forecast or measured."""
