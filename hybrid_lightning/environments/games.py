"""Games of this package: guessing a number, and several attempts at a reasoning-gym problem."""

import random
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.reasoning_gym_tasks import made_again
from hybrid_lightning.shared.user_code import compile_pattern
from hybrid_lightning.types import Message, Prompt

_NUMBER = re.compile(r"(?<![\d.])-?\d+(?!\.?\d)")


class GuessNumber(Environment):
    """A number-guessing game: the answer to a guess is higher or lower, and the reward is 1 in the turn that finds the number.

    A guess is the last whole number in the message. A message without a number, or with a number out of range, gets the answer
    `invalid` and counts in `invalid_guesses`. Halving the range finds one of n numbers in at most floor(log2 n) + 1 guesses.

    Args:
        low: Smallest number.
        high: Largest number.
        rules: Message before the first turn; `{low}` and `{high}` are filled in. Empty if the prompt has the rules.
        higher: Answer to a guess that is too low.
        lower: Answer to a guess that is too high.
        right: Answer to the right number. It ends the episode, and the policy does not read it.
        invalid: Answer to a message that is not a guess; `{low}` and `{high}` are filled in.

    Raises:
        ConfigError: If the range has fewer than two numbers, or the answers to low and high guesses are the same.

    Example:
        >>> game = GuessNumber(1, 100)
        >>> game.start(Prompt(text="Play."), seed=0)[0]["content"]
        'Guess my number from 1 to 100.'
        >>> [game.step({"role": "assistant", "content": guess}).messages[0]["content"] for guess in ("I say 30", "50", "none")]
        ['higher', 'right', 'Say a whole number from 1 to 100.']
    """

    thread_safe: ClassVar[bool] = True

    def __init__(
        self,
        low: int = 1,
        high: int = 100,
        rules: str = "Guess my number from {low} to {high}.",
        higher: str = "higher",
        lower: str = "lower",
        right: str = "right",
        invalid: str = "Say a whole number from {low} to {high}.",
    ) -> None:
        if low >= high:
            raise ConfigError(f"GuessNumber: low={low} and high={high} leave nothing to guess; give a high above low")
        if higher == lower:
            raise ConfigError(f"GuessNumber: higher={higher!r} and lower={lower!r} are the same answer; make them differ")
        self.low, self.high = low, high
        self.higher, self.lower, self.right = higher, lower, right
        self.rules, self.invalid = (text.replace("{low}", str(low)).replace("{high}", str(high)) for text in (rules, invalid))
        self.number = low

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Draw the number."""
        self.number = random.Random(seed).randint(self.low, self.high)
        return [{"role": "user", "content": self.rules}] if self.rules else []

    def step(self, message: Message) -> Step:
        """Answer a guess."""
        numbers = _NUMBER.findall(message["content"])
        # A number with thousands of digits is out of range, and Python does not convert it.
        guess = int(numbers[-1]) if numbers and len(numbers[-1]) < 20 else None
        valid = guess is not None and self.low <= guess <= self.high
        if guess is None or not valid:
            answer = self.invalid
        elif guess == self.number:
            answer = self.right
        else:
            answer = self.higher if guess < self.number else self.lower
        found = guess == self.number
        return Step([{"role": "user", "content": answer}], float(found), over=found, counts={"invalid_guesses": float(not valid)})


class ReasoningGymEnvironment(Environment):
    """A reasoning-gym problem with several attempts: after a wrong answer the policy gets a message, and may try again.

    The episode ends with a score of 1, or when the attempts are used up. The reward is the verifier's score of the last attempt,
    from 0.0 to 1.0. Use it with prompts of `ReasoningGymSource`. The count `attempts` is the number of attempts.

    Args:
        attempts: Number of times that the policy may answer.
        pattern: Regular expression with one group for the answer, such as `<answer>(.*?)</answer>`; the last match counts.
            None takes the whole message.
        wrong: Message after a wrong answer; `{left}` is the number of attempts left.

    Raises:
        ConfigError: If `attempts` is below 1, the pattern does not have exactly one group, or reasoning-gym is missing.
    """

    def __init__(
        self, attempts: int = 3, pattern: str | None = None, wrong: str = "That is not right. Attempts left: {left}. Try again."
    ) -> None:
        if attempts < 1:
            raise ConfigError(f"ReasoningGymEnvironment: attempts={attempts}; give at least 1")
        self.pattern = compile_pattern(pattern or "(.*)", 1)
        self.attempts, self.wrong = attempts, wrong
        self.left = attempts
        self._problem: tuple[Any, dict[str, Any]]

    def start(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        """Rebuild the prompt's problem."""
        self._problem = made_again(type(self).__name__, prompt)
        self.left = self.attempts
        return []

    def step(self, message: Message) -> Step:
        """Score an answer."""
        self.left -= 1
        answers = [match.strip() for match in self.pattern.findall(message["content"]) if match.strip()]
        dataset, entry = self._problem
        try:
            score = min(float(dataset.score_answer(answers[-1], deepcopy(entry))), 1.0) if answers else 0.0
        except Exception:  # verifiers do not expect answers of a different form
            score = 0.0
        if score >= 1.0 or not self.left:
            return Step((), score, over=True, end="answered", counts={"attempts": 1.0})
        said = self.wrong.replace("{left}", str(self.left))
        return Step([{"role": "user", "content": said}], counts={"attempts": 1.0})
