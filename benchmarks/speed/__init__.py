"""Measures the time of a step: compared with TRL, and between methods, sizes and commits."""
