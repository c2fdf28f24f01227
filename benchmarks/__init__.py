"""Benchmarks of speed, memory and faults, and the study: see README.md. Every command is `python -m benchmarks.ROOM.NAME`."""
