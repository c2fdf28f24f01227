"""Mathematical answers: what a completion answers, and whether that equals the reference."""
