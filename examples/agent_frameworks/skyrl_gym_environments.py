"""`SkyRL`: environments of SkyRL Gym."""

from copy import deepcopy
from typing import Any

import skyrl_gym

from hybrid_lightning.environments import Environment, Step
from hybrid_lightning.errors import ConfigError


class SkyRL(Environment):
    """An environment of SkyRL Gym. `extras` gets the columns of the row, and `reward_spec.ground_truth` its reference answer.

    `postprocessed_action` is ignored: the policy is trained on what it sampled.

    Args:
        id: Name of the environment, such as "gsm8k_multi_turn".
        extras: Further extras, such as `{max_turns: 3}`.
    """

    def __init__(self, id: str, extras: dict[str, Any] | None = None) -> None:
        self.id, self.extras = id, extras or {}

    def start(self, prompt, seed):
        """Make the environment of the row, and give it the prompt."""
        row = {"reward_spec": {"ground_truth": prompt.answer}, **prompt.columns, **self.extras}
        self.game = skyrl_gym.make(self.id, extras=deepcopy(row))
        asked = [dict(message) for message in prompt.messages or [{"role": "user", "content": prompt.text}]]
        conversation, _ = self.game.init(deepcopy(asked))
        if conversation[: len(asked)] != asked:
            raise ConfigError(f"{self.id} changes the prompt of {prompt.place}; give the data the prompt that it wants")
        return conversation[len(asked) :]

    def step(self, message):
        """Act with the text of the message."""
        answer = self.game.step(message["content"])
        return Step(answer["observations"], answer["reward"], bool(answer["done"]))

    def close(self):
        """Close the environment."""
        self.game.close()
