"""Mathematical answers: the reward in match.py, and the process that compares them in math_worker.py."""
