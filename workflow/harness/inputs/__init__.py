"""What runs are fed with: rows, tokens, models, each with its hash and with counts of what was cut or dropped."""
