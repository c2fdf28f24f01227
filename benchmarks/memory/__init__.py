"""Measures the memory of runs, and compares it with the plan."""
