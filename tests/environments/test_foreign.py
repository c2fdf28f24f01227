"""Environments of other packages by the forms of their methods: on stand-ins, and on the real packages where installed."""

import random
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest

from hybrid_lightning.environments import GymEnvironment, OpenEnvEnvironment
from hybrid_lightning.environments.answers import checked_messages, checked_step
from hybrid_lightning.environments.foreign import content_text
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt

PROMPT = Prompt(text="Play.", answer="4", columns={"level": 2})


def here(name):
    return f"{__file__}:{name}"


def texts(messages):
    return [message["content"] for message in messages]


def play(environment, moves, prompt=PROMPT, seed=3):
    """The messages of an environment's episode, its rewards, and whether it is over; with random states of its own."""
    random.seed(seed)
    np.random.seed(seed)
    environment = environment.new()
    said, rewards, over = texts(checked_messages(environment.start(prompt, seed))), [], False
    for move in moves:
        step = checked_step(environment.step({"role": "assistant", "content": move}))
        said += texts(step.messages)
        rewards.append(float(step.reward))
        over = step.over
    environment.close()
    return said, rewards, over


# ---- the forms


class Gym:
    """Gymnasium's form; `old` is Gym's, `bare` returns no info from `reset` and takes no seed."""

    def __init__(self, sizes, form="new"):
        self.size, self.form, self.closed = sizes.pop(), form, False  # which changes what another object must not get
        if form == "bare":
            self.reset = lambda: "go"

    def reset(self, *, seed=None, options=None):
        return f"seed {seed}", {}

    def step(self, action):
        answer = (np.arange(self.size), np.float32(0.5), np.bool_(action == "end"))
        return (*answer, {}) if self.form == "old" else (*answer, action == "cut", {})

    def close(self):
        self.closed = True


class Odd:
    def __init__(self, said=None):
        self.reset = lambda: said or object()

    def step(self, action):
        return "text"


@pytest.mark.parametrize(("form", "said"), [("new", "seed 3"), ("old", "seed 3"), ("bare", "go")])
def test_gymnasium(form, said):
    environment = GymEnvironment(here("Gym"), {"sizes": [2], "form": form})
    assert play(environment, ["a", "end"]) == ([said, "[0, 1]", "[0, 1]"], [0.5, 0.5], True)
    assert form != "new" or play(environment, ["cut"])[2], "a truncated episode is over, too"
    made = environment.new()
    made.start(PROMPT, 7)
    made.close()
    assert made.game.closed and environment.game is None, "an episode has an object of its own"


def test_what_does_not_fit_is_said_in_one_line():
    for make, message in (
        (lambda: GymEnvironment(here("Gym"), {"size": 1}), "arguments.size: .* has no parameter 'size'"),
        (lambda: GymEnvironment("no_such_package.make"), "make='no_such_package.make': there is no module 'no_such_package'"),
        (lambda: play(GymEnvironment(here("Odd")), []), "cannot be written as text .*wrap the environment"),
        (lambda: play(GymEnvironment(here("Odd"), {"said": [{"type": "image"}]}), []), "a block of type 'image'; only texts"),
        (
            lambda: play(GymEnvironment(here("Odd"), {"said": "go"}), ["a"]),
            "step returned 'text', which does not follow Gymnasium's API; wrap it",
        ),
        (lambda: play(OpenEnvEnvironment("http://x", here("Client"), observation="body"), []), "no such field; it has text"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@dataclass
class Seen:
    text: str


class Client:
    """OpenEnv's form, with a typed action and observation."""

    def __init__(self, base_url, seedless=False):
        self.base_url = base_url
        if seedless:
            self.reset = lambda: Client.reset(self)

    def reset(self, seed=None):
        return SimpleNamespace(observation=Seen(f"{self.base_url} {seed}"), reward=None, done=seed == 0)

    def step(self, action):
        return SimpleNamespace(observation=Seen(action.code), reward=1.0, done=action.code == "end")


def test_openenv_by_a_class_of_client():
    environment = OpenEnvEnvironment("http://x", here("Client"), "code", "types.SimpleNamespace", "text")
    assert play(environment, ["a", "end"]) == (["http://x 3", "a", "end"], [1.0, 1.0], True)
    assert play(environment, ["a"], seed=0) == (["http://x 0"], [0.0], True), "over from the start"
    seedless = OpenEnvEnvironment("http://x", here("Client"), observation="text", arguments={"seedless": True})
    assert play(seedless, [])[0] == ["http://x None"]


def test_observations_as_text():
    assert [content_text(value) for value in ("a", None, [], 0)] == ["a", "", "", "0"]
    assert content_text(np.eye(2)) == "[[1.0, 0.0], [0.0, 1.0]]" and content_text({"é": Seen("x")}) == '{"é": {"text": "x"}}'


# ---- the packages


def real(package):
    return pytest.importorskip(package, reason=f"needs {package}: pip install 'hybrid-lightning[environments]'")


def replays(environment, moves, prompt=PROMPT):
    """An episode of a real environment that is the same for the same seed, and another for another seed."""
    first, again = (play(environment, moves, prompt) for _ in range(2))
    assert first == again
    assert any(play(environment, moves, prompt, seed)[0] != first[0] for seed in range(4, 9))
    return first


def test_gem():
    real("gem")
    guesses = [f"\\boxed{{{n}}}" for n in range(1, 20)]
    for game, moves in {"GuessTheNumber-v0-random": guesses, "Game2048-v0-easy": ["\\boxed{up}"]}.items():
        said, rewards, _ = replays(GymEnvironment("gem.make", {"env_id": f"game:{game}"}), moves)
        assert len(said) == len(rewards) + 1 and all(said), game
    environment = GymEnvironment("gem.make", {"env_id": "game:GuessTheNumber-v0-easy"})
    ends = [play(environment, guesses[n : n + 1]) for n in range(10)]
    assert sorted(rewards[0] for _, rewards, over in ends if over) == [1.0] and all("guessed" in said[1] for said, _, _ in ends)


@pytest.fixture
def server():
    """Address of a server of OpenEnv with a game."""
    real("openenv")
    uvicorn = pytest.importorskip("uvicorn")
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    from pydantic import StringConstraints

    class Guess(Action):
        message: Annotated[str, StringConstraints(min_length=1)]

    class Hint(Observation):
        text: str = ""
        tried: list[str]

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **options):
            self.number, self.tried = random.Random(seed).randint(1, 9), []
            return Hint(tried=[], text=f"1 to {random.Random(seed).randint(10, 10**9)}")

        def step(self, action, timeout_s=None, **options):
            self.tried.append(action.message)
            found = action.message == str(self.number)
            return Hint(text="right" if found else "wrong", tried=self.tried, reward=float(found), done=found)

        @property
        def state(self):
            return State()

    app = create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=8)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(20)


def test_openenv_itself(server):
    environment = OpenEnvEnvironment(server, observation="text", arguments={"message_timeout_s": 20})
    _, rewards, over = replays(environment, [str(n) for n in range(1, 10)])
    assert sorted(rewards) == [0.0] * 8 + [1.0] and over
    both = [OpenEnvEnvironment(server).new() for _ in range(2)]
    for number, one in enumerate(both):
        one.start(PROMPT, 3)
        step = one.step({"role": "assistant", "content": f"x{number}"})
        assert f'"tried": ["x{number}"]' in step.messages[0]["content"], "each episode has a session of its own"
    refused = both[0].step({"role": "assistant", "content": ""})
    assert refused.messages[0]["content"].startswith("error: the action is not valid") and not refused.over
    assert refused.counts == {"refused_actions": 1} and "x0" in texts(both[0].step({"content": "y"}).messages)[0]
    for one in both:
        one.close()
