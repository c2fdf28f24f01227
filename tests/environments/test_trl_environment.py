"""TRL's environment classes, such as its documentation has them."""

import asyncio
import random
import time
from typing import ClassVar

import pytest
from environments_in_turns import EnvironmentsInTurns
from transformers.utils import get_json_schema

from hybrid_lightning.environments import EpisodeLimits, HermesCalls, TRLEnvironment
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.user_code import load_function
from hybrid_lightning.types import Prompt


class Counter:
    """Counts up to a goal, from a number that follows from the seed."""

    asked: ClassVar[list[int]] = []

    def __init__(self, step=1):
        self.by = step
        random.seed(4)

    def reset(self, goal, **row):
        self.count, self.goal, self.row = random.Random(row["seed"]).randint(1, 10**6), goal, row
        self.first = self.count
        return [{"type": "text", "text": f"It is {self.count}."}]

    def add(self, times: int) -> str:
        """Count up.

        Args:
            times: How often.
        """
        self.count += self.by * times
        return f"{self._since()} more"

    async def wait(self) -> str:
        """Do nothing."""
        await asyncio.sleep(0.3)
        return "waited"

    def block(self) -> str:
        """Do nothing, as a tool that asks a server and is not `async`."""
        time.sleep(0.3)
        return "waited"

    def _since(self):
        return self.count - self.first

    def get_reward(self):
        self.asked.append(self.count)
        return min(1.0, self._since() / self.goal)


class Judged(Counter):
    async def get_reward(self):
        return 0.5 if self.goal else 1 / 0


class Free(Counter):
    get_reward = None


class Mute:
    def reset(self):
        """Nothing to call."""


def here(name):
    return f"{__file__}:{name}"


PROMPT = Prompt(text="Count to 4.", answer="4", columns={"goal": 4, "hint": "add"})
ADD = '<tool_call>{"name": "add", "arguments": {"times": 1}}</tool_call>'
BLOCK = '<tool_call>{"name": "block", "arguments": {}}</tool_call>'
WAIT = '<tool_call>{"name": "wait", "arguments": {}}</tool_call>'


def episode(name, messages, prompt=PROMPT, turn_rewards=False, arguments=None):
    """An episode's messages, its rewards, and its reward at the end; beside it, another one makes the same calls."""
    environment = TRLEnvironment(here(name), arguments, HermesCalls())
    episodes = EnvironmentsInTurns(environment, EpisodeLimits(max_failed_share=1), turn_rewards=turn_rewards)
    said = [message["content"] for message in episodes.start([prompt, prompt], [7, 7])[0]]
    rewards = []
    for message in messages:
        step = episodes.step({number: {"role": "assistant", "content": message} for number in (0, 1)})[0]
        if not hasattr(step, "reward"):
            return step.reason
        said += [answer["content"] for answer in step.messages]
        rewards.append(step.reward)
    earned = episodes.conclude([0, 1])[0]
    episodes.close()
    return said, rewards, earned


def test_public_methods_are_tools_and_the_reward_is_asked_once_or_each_turn():
    before = random.getstate()
    asked = load_function(here("Counter")).asked
    said, rewards, earned = episode("Counter", [ADD, WAIT, ADD + ADD, "Done."], arguments={"step": 1})
    assert said[-4:] == ["1 more", "waited", "2 more", "3 more"] and "It is " in said[-5]
    assert rewards == [0.0] * 4 and earned == 0.75 and len(asked) == 2, "once for each episode"
    assert random.getstate() == before
    assert episode("Counter", [ADD], arguments={"step": 3})[1:] == ([0.0], 0.75), "also where a bound ends it"
    _, rewards, earned = episode("Counter", [ADD, WAIT, ADD + ADD, "Done."], turn_rewards=True)
    assert rewards == [0.25, 0.0, 0.5, 0.0] and earned == 0.0 and len(asked) == 4 + 2 * 4


@pytest.mark.parametrize("calls", [WAIT + WAIT, BLOCK])
def test_episodes_wait_side_by_side_and_async_tools_of_a_message_too(calls):
    episodes = EnvironmentsInTurns(TRLEnvironment(here("Counter"), call_format=HermesCalls()), EpisodeLimits())
    episodes.start([PROMPT] * 16, [7] * 16)
    began = time.monotonic()
    steps = episodes.step({number: {"role": "assistant", "content": calls} for number in range(16)})
    seconds = time.monotonic() - began
    episodes.close()
    assert all({message["content"] for message in step.messages} == {"waited"} for step in steps.values())
    assert seconds < 4  # one by one it would be 4.8 s at least


def test_rewards_may_be_async_or_missing_and_one_that_raises_is_not_a_reward():
    assert episode("Judged", [WAIT, "Done."])[2] == 0.5 and episode("Judged", [WAIT, "Done."], turn_rewards=True)[1] == [0.5, 0.0]
    assert episode("Free", [ADD, "Done."])[1:] == ([0.0, 0.0], 0.0)
    unlucky = Prompt(text="", columns={"goal": 0})
    assert "ZeroDivisionError: division by zero" in episode("Judged", [WAIT], unlucky)[2].reason
    assert "ZeroDivisionError: division by zero" in episode("Judged", [WAIT], unlucky, turn_rewards=True)


def test_tools_are_described_as_trl_does_reset_gets_the_row_and_checkpoints_the_arguments():
    config = TRLEnvironment(here("Counter"), {"step": 2}).to_config()
    assert config["init_args"] == {"factory": here("Counter"), "arguments": {"step": 2}}
    environment = TRLEnvironment(here("Counter"))
    assert environment.tools() == [get_json_schema(getattr(Counter(), name)) for name in ("add", "block", "wait")]
    environment.start(PROMPT, 7)
    assert environment._object.row == {"prompt": "Count to 4.", "answer": "4", "seed": 7, "hint": "add"}
    chat = Prompt(messages=({"role": "user", "content": "Count."},), columns={"goal": 1})
    environment.start(chat, 7)
    assert environment._object.row["prompt"] == [{"role": "user", "content": "Count."}]


def test_whatever_is_not_an_environment_is_refused():
    for name, message in (("EpisodeLimits", "which has no method reset; add it"), ("Mute", "reset is its only public method")):
        with pytest.raises(ConfigError, match=message):
            TRLEnvironment(here(name))
