"""Fine-tuning methods, one file each, all entering the harness by the contract in `baselines.method`."""
