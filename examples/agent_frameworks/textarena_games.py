"""`TextArena`: games of TextArena for one player."""

from typing import Any

import textarena

from hybrid_lightning.environments import Environment
from hybrid_lightning.errors import ConfigError


class TextArena(Environment):
    """A game for one player. Its reward comes in the turn in which it is done.

    Args:
        env_id: Name of the game, with `-raw`: an observation then has only the new text.
        arguments: Further arguments of `textarena.make`.
    """

    def __init__(self, env_id: str, arguments: dict[str, Any] | None = None) -> None:
        if not env_id.endswith("-raw"):
            raise ConfigError(f"env_id={env_id!r}; give a game without TextArena's wrappers, such as {env_id}-raw")
        self.env_id, self.arguments = env_id, arguments or {}

    def start(self, prompt, seed):
        """Reset with the seed."""
        self.game = textarena.make(self.env_id, **self.arguments)
        self.game.reset(num_players=1, seed=seed)
        return self._news()

    def step(self, message):
        """Make a move."""
        done, _ = self.game.step(message["content"])
        if not done:
            return self._news(), 0.0, False
        news = self._news()
        rewards, infos = self.game.close()
        reason = str(infos.get(0, {}).get("reason", ""))
        return news if reason in news else f"{news}\n{reason}".strip(), rewards.get(0, 0.0), True

    def _news(self) -> str:
        """What the player has not read yet: (who, text, kind) of each message, without the player's own."""
        player, messages = self.game.get_observation()
        return "\n".join(text for who, text, *_ in messages if who != player)
