"""The training loop, its resume state, the observer probe and the engagement verdict."""
