"""`TextWorld`: games that TextWorld makes, each from its seed."""

import re
import tempfile
from pathlib import Path
from typing import Any

import textworld
from textworld.challenges import CHALLENGES

from hybrid_lightning.environments import Environment

_BANNER = re.compile(r"^[ _|\\/$>]+\n", re.MULTILINE)  # the lines of the picture that games begin with


class TextWorld(Environment):
    """A game of TextWorld. The reward of a turn is by how much it raised the score.

    A game is compiled when its seed is first played, which takes 2 to 9 s.

    Args:
        challenge: Name of a challenge, such as "tw-coin_collector".
        settings: Its settings, such as `{level: 3}`.
    """

    def __init__(self, challenge: str, settings: dict[str, Any] | None = None) -> None:
        self.challenge, self.settings = challenge, settings or {}

    def start(self, prompt, seed):
        """Begin the game of the seed."""
        # Its interpreter knows games of TextWorld by "tw-".
        path = Path(tempfile.gettempdir(), f"tw-{self.challenge}-{'-'.join(map(str, self.settings.values()))}-{seed}.z8")
        if not path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                options = textworld.GameOptions()
                options.seeds, options.path = seed, f"{folder}/game.z8"
                textworld.generator.compile_game(CHALLENGES[self.challenge][1](dict(self.settings), options), options)
                for suffix in (".json", ".z8"):  # the game last: other processes may make the same one
                    Path(f"{folder}/game{suffix}").replace(path.with_suffix(suffix))
        self.game, self.score = textworld.start(str(path)), 0
        return _BANNER.sub("", self.game.reset().feedback).strip()

    def step(self, message):
        """Give a command."""
        state, score, done = self.game.step(message["content"].strip())
        before, self.score = self.score, score
        return state.feedback.strip(), score - before, done

    def close(self):
        """End the game."""
        self.game.close()
