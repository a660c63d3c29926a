"""One training step, for training, forecasting, measuring and checking alike: attach a method, run, count."""
