"""The adapters in `examples/agent_frameworks`, where their packages are installed."""

import tempfile
from pathlib import Path

import pytest
from test_foreign import play, replays

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt

FOLDER = Path(__file__).parents[2] / "examples" / "agent_frameworks"
PROMPT = Prompt(text="Play.", answer="4", columns={"level": 2})


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_textarena():
    pytest.importorskip("textarena")
    from textarena_games import TextArena

    environment = TextArena("GuessTheNumber-v0-raw")
    ends = [play(environment, [f"[{n}]"]) for n in range(1, 21)]
    won = [said[-1] for said, rewards, over in ends if over and rewards == [1.0]]
    assert len(won) == 1 and "Congratulations" in won[0]
    said, rewards, over = play(environment, ["foo", "foo"])
    assert over and len(rewards) == 2 and "foo" not in said[1]
    replays(TextArena("Sokoban-v0-raw"), ["[up]"])
    with pytest.raises(ConfigError, match="such as Chess-v0-raw"):
        TextArena("Chess-v0")


def test_skyrl():
    pytest.importorskip("skyrl_gym")
    from skyrl_gym_environments import SkyRL

    environment = SkyRL("gsm8k_multi_turn", {"max_turns": 3})
    said, rewards, over = play(environment, ["#### 3", "It is\n#### 4"], PROMPT)
    assert over and "exact format" in said[0] and rewards == pytest.approx([0.2 / 3, 1.0])


def test_textworld(tmp_path, monkeypatch):
    pytest.importorskip("textworld")
    from textworld_games import TextWorld

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said, rewards, over = replays(TextWorld("tw-coin_collector", {"level": 1}), ["look", "take coin"])
    assert over and rewards == [0.0, 1.0] and "$" not in said[0] and "coin" in said[0] and not said[1].endswith("0/1")
