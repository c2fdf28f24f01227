"""Findings about a run that keep it from learning, the rewards of reference answers, and the run's page."""
