"""How long a step takes, beside TRL, between methods, sizes and commits."""
