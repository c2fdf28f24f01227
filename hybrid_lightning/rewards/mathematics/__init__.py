"""Mathematical answers: what a completion answers, and whether that equals the reference answer.

match.py        the reward `MathMatch`
verifier.py     runs the worker process and talks to it
math_worker.py  the worker: parses and compares answers with math-verify
math_text.py    finds the answer in a text, and rewrites it so that math-verify can read it
math_units.py   units, and conversion between them
"""
