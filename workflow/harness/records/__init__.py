"""Records of runs, cells and searches: how they are written and read, and which code made them."""
