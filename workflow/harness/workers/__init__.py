"""Short jobs in processes that have their imports behind them: a server that imports once and forks, and its client."""
