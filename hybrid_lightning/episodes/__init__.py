"""Plays episodes, turn by turn."""
