"""How much memory a run takes, beside what was planned."""
