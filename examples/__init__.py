"""Adapters of other packages, each in a file that can be copied."""
