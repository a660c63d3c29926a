"""What was: records of runs, cells and searches, how they are written and read, and the code that made them."""
