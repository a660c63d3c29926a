"""Tables and figures of the memory and speed of a step, from records alone."""
