import random

import pytest

from hybrid_lightning.environments import GuessNumber, ReasoningGymEnvironment
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt


def said(environment, text):
    return environment.step({"role": "assistant", "content": text})


def halving(game, low, high):
    """Guesses that halving the range takes, and the number that it finds."""
    for count in range(1, 100):
        guess = (low + high) // 2
        step = said(game, f"My guess is {guess}.")
        assert step.reward == float(step.over) and step.counts == {"invalid_guesses": 0.0}
        if step.over:
            return count, guess
        low, high = (guess + 1, high) if step.messages[0]["content"] == "+" else (low, guess - 1)
    raise AssertionError("not found")


def test_halving_finds_every_number_of_the_range_in_the_guesses_that_are_promised():
    game, found = GuessNumber(3, 66, higher="+", lower="-"), []
    for seed in range(600):
        game.start(Prompt(text="Play."), seed)
        found.append(halving(game, 3, 66))
    counts, numbers = zip(*found, strict=True)
    assert set(numbers) == set(range(3, 67)) and max(counts) == 7


def test_whatever_is_not_a_guess_is_answered_and_counted_and_the_number_follows_from_the_seed_alone():
    random.seed(1)
    before = random.getstate()
    game, other = (GuessNumber(1, 100, "", invalid="{low} to {high}!").new() for _ in range(2))
    assert game.start(Prompt(text="Play."), 0) == other.start(Prompt(text="Play."), 0) == []
    assert game.number == other.number and random.getstate() == before
    for text in ("", "none", "0", "-5", "101", "3.5", "9" * 5000, "50, no: 101"):
        step = said(game, text)
        assert step.messages[0]["content"] == "1 to 100!" and step.counts == {"invalid_guesses": 1.0}
        assert (step.reward, step.over) == (0.0, False)


def test_bad_arguments():
    for make, message in (
        (lambda: GuessNumber(5, 5), "low=5 and high=5 leave nothing to guess"),
        (lambda: GuessNumber(higher="?", lower="?"), "make them differ"),
        (lambda: ReasoningGymEnvironment(attempts=0), "attempts=0"),
        (lambda: ReasoningGymEnvironment(pattern="a"), "put only the answer in"),
        (
            lambda: ReasoningGymEnvironment().start(Prompt(text="1+1="), 0),
            "has no column 'task'; set data.source=ReasoningGymSource",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_problem_may_be_tried_again_and_the_last_attempt_counts():
    pytest.importorskip("reasoning_gym", reason="the optional extra reasoning-gym is not installed")
    config = {"seed": 0, "size": 2}
    prompt = Prompt(text="?", columns={"task": "leg_counting", "config": config, "item": 1})
    import reasoning_gym

    right = reasoning_gym.create_dataset("leg_counting", **config)[1]["answer"]
    environment = ReasoningGymEnvironment(attempts=2, pattern="<(.*?)>", wrong="No, {left} left").new()
    assert list(environment.start(prompt, 0)) == []
    first, second = said(environment, f"{right}"), said(environment, f"<1> or <{right}>")
    assert (first.messages[0]["content"], first.reward, first.over) == ("No, 1 left", 0.0, False)
    assert (second.reward, second.over, second.end) == (1.0, True, "answered")
    environment.start(prompt, 0)
    said(environment, "<none>")
    assert said(environment, "<none>").over and said(environment, "<none>").reward < 1.0
