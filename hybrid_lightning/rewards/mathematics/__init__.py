"""Mathematical answers: the reward in match.py, a worker process in math_worker.py, and verifier.py, which talks to it."""
