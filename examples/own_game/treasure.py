"""A game of several turns: the whole environment."""

import random

from hybrid_lightning.environments import Environment


class Treasure(Environment):
    """A treasure lies in one of `boxes`; a wrong guess is answered by the direction in which it lies."""

    def __init__(self, boxes: int = 15) -> None:
        self.boxes = boxes

    def start(self, prompt, seed):
        """Hide it: all episodes of a group get the same seed, and so the same box."""
        self.box = random.Random(seed).randint(1, self.boxes)

    def step(self, message):
        """Answer a guess with a message, a reward, and whether the episode is over."""
        guess = message["content"]
        if not guess.isdecimal() or not 1 <= int(guess) <= self.boxes:
            return "?", 0.0, False
        if int(guess) == self.box:
            return "=", 1.0, True
        return ">" if int(guess) < self.box else "<", 0.0, False
