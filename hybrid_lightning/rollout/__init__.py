"""Generation of completions, and rollouts as training data."""
