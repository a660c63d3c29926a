"""The contract suite: checks that every method must pass, observed from outside on a tiny model."""
