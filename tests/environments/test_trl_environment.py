"""TRL's environment classes, such as its documentation has them."""

import random

import pytest
from transformers.utils import get_json_schema

from hybrid_lightning.environments import EpisodeLimits, HermesCalls, RunningEpisodes, TRLEnvironment
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt


class Counter:
    """Counts up to a goal; what it begins with is drawn from the global generator, since TRL gives no seed."""

    def __init__(self, step=1):
        self.by = step
        random.seed(4)

    def reset(self, goal, **row):
        self.count, self.goal, self.row = random.randint(1, 10**6), goal, row
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
        return "waited"

    def _since(self):
        return self.count - self.first

    def get_reward(self):
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
WAIT = '<tool_call>{"name": "wait", "arguments": {}}</tool_call>'


def episode(name, messages, prompt=PROMPT, **options):
    """What an episode says, its rewards, and how it ends."""
    episodes = RunningEpisodes(
        TRLEnvironment(here(name), call_format=HermesCalls(), **options), EpisodeLimits(max_failed_share=1)
    )
    begun = episodes.start([prompt, prompt], [7, 7])
    assert begun[0] == begun[1], "a group has one task, although TRL gives no seed"
    said, rewards, end = [message["content"] for message in begun[0]], [], ""
    for message in messages:
        step = episodes.step({0: {"role": "assistant", "content": message}})[0]
        if not hasattr(step, "reward"):
            return step.reason
        said += [answer["content"] for answer in step.messages]
        rewards.append(step.reward)
        end = step.end if step.over else ""
    episodes.close()
    return said, rewards, end


def test_public_methods_are_tools_and_rewards_add_up_to_the_last_value():
    before = random.getstate()
    said, rewards, end = episode("Counter", [ADD, WAIT, ADD + ADD, "Done."], arguments={"step": 1})
    assert said[-4:] == ["1 more", "waited", "2 more", "3 more"] and "It is " in said[-5]
    assert rewards == [0.25, 0.0, 0.5, 0.0] and end == "answered"
    assert episode("Counter", [ADD], arguments={"step": 3})[1] == [0.75]
    assert random.getstate() == before


def test_rewards_may_be_async_or_missing_and_one_that_raises_is_no_reward():
    assert episode("Judged", [WAIT, "Done."])[1] == [0.5, 0.0]
    assert episode("Free", [ADD, "Done."])[1] == [0.0, 0.0]
    assert "ZeroDivisionError: division by zero" in episode("Judged", [WAIT], Prompt(text="", columns={"goal": 0}))


def test_tools_are_described_as_trl_does_reset_gets_the_row_and_checkpoints_the_arguments():
    config = TRLEnvironment(here("Counter"), {"step": 2}).to_config()
    assert config["init_args"] == {"factory": here("Counter"), "arguments": {"step": 2}}
    environment = TRLEnvironment(here("Counter"))
    assert environment.tools() == [get_json_schema(getattr(Counter(), name)) for name in ("add", "wait")]
    environment.start(PROMPT, 7)
    assert environment._object.row == {"prompt": "Count to 4.", "answer": "4", "seed": 7, "hint": "add"}
    chat = Prompt(messages=({"role": "user", "content": "Count."},), columns={"goal": 1})
    environment.start(chat, 7)
    assert environment._object.row["prompt"] == [{"role": "user", "content": "Count."}]


def test_what_is_no_environment_is_refused():
    for name, message in (("EpisodeLimits", "which has no method reset; add one"), ("Mute", "reset is its only public method")):
        with pytest.raises(ConfigError, match=message):
            TRLEnvironment(here(name))
