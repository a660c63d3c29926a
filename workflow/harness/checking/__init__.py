"""The contract suite: what every method must hold to, observed from outside on a tiny model."""
