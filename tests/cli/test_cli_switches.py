"""A class in place of another one: which options it keeps, and what a command says about it at its start."""

import sys
from pathlib import Path

import pytest
from cli_runs import parse, run
from jsonargparse import ArgumentParser

from hybrid_lightning.cli import main as cli
from hybrid_lightning.rewards import RewardFunction

CONFIGS = Path(__file__).parents[2] / "configs"
GSPO, GRPO, PATTERN = f"{CONFIGS}/gspo.yaml", f"{CONFIGS}/grpo.yaml", r"\A(?:\[[\d ]*\])?(\d+)\Z"
JUDGE = ["--model.reward=JudgeReward", *(f"--model.reward.{name}=x" for name in ("rubric", "base_url", "model"))]
JUDGE_FILE = "model: {reward: {class_path: JudgeReward, init_args: {rubric: x, base_url: x, model: x}}}"
OWN = """

class Bonus(StartsWithDigit):
    def __init__(self, scale: float = 1.0, **others) -> None:
        super().__init__(**others)


class Required(StartsWithDigit):
    def __init__(self, bonus: float) -> None:
        super().__init__(bonus)


class Another(RewardFunction):
    def __init__(self, bonus: float = 0.0) -> None: ...
    def __call__(self, completions, prompts): ...
"""
JUDGED = f"model.reward: JudgeReward in place of ExactMatch drops pattern={PATTERN!r}"

# A config, options, a class of the result with its options, and the lines at the start.
SWITCHES = [
    (GSPO, JUDGE, "reward", {"pattern": None}, [JUDGED]),
    (GSPO, ["--config=judge.yaml"], "reward", {"pattern": None}, [JUDGED]),
    (
        GSPO,
        [*JUDGE, "--model.reward.pattern=(x)"],
        "reward",
        {"pattern": "(x)"},
        [JUDGED],
    ),
    (
        GSPO,
        ["--model.reward=MathMatch"],
        "reward",
        {"pattern": PATTERN},
        [f"model.reward: MathMatch in place of ExactMatch keeps pattern={PATTERN!r}"],
    ),
    (
        GSPO,
        ["--model.sampler=VLLMSampler"],
        "sampler",
        {"max_new_tokens": 20, "temperature": 1.0},
        ["model.sampler: VLLMSampler in place of Sampler keeps max_new_tokens=20"],
    ),
    (GSPO, ["--model.loss=GRPOLoss"], "loss", {"clip_low": 0.2, "clip_high": 0.2}, []),
    (
        GRPO,
        ["--model.loss.kl_coef=0.1", "--model.loss.dual_clip=3", "--model.loss.clip_low=0.1", "--model.loss=GSPOLoss"],
        "loss",
        {"kl_coef": 0.1, "dual_clip": 3.0, "clip_low": 3e-4, "clip_high": 4e-4},
        ["model.loss: GSPOLoss in place of GRPOLoss keeps kl_coef=0.1, dual_clip=3.0 and drops clip_low=0.1"],
    ),
    (
        GRPO,
        ["--model.loss.clip_low=0.1", "--model.loss=DrGRPOLoss"],
        "loss",
        {"clip_low": 0.1},
        ["model.loss: DrGRPOLoss in place of GRPOLoss keeps clip_low=0.1"],
    ),
    (
        GSPO,
        ["--model.optimizer=torch.optim.SGD"],
        "optimizer",
        {"weight_decay": 0.0},
        ["model.optimizer: SGD in place of AdamW keeps weight_decay=0.0 and drops betas=(0.9, 0.99)"],
    ),
    ("t.yaml", ["--model.optimizer=torch.optim.SGD"], "optimizer", {"weight_decay": 0}, []),
    (
        "t.yaml",
        ["--model.reward.bonus=2", "--model.reward=my_parts.Required"],
        "reward",
        {"bonus": 2.0},
        ["model.reward: Required in place of StartsWithDigit keeps bonus=2.0"],
    ),
    (
        "t.yaml",
        ["--model.reward.bonus=2", "--model.reward=my_parts.Bonus"],
        "reward",
        {"bonus": 2.0, "scale": 1.0},
        ["model.reward: Bonus in place of StartsWithDigit keeps bonus=2.0"],
    ),
    (
        "t.yaml",
        ["--model.reward.bonus=2", "--model.reward=my_parts.Another"],
        "reward",
        {"bonus": 0.0},
        ["model.reward: Another in place of StartsWithDigit drops bonus=2.0"],
    ),
]


@pytest.fixture(scope="module", autouse=True)
def own(folder):
    """Rewards of a user, and a config that names another reward."""
    with (folder / "my_parts.py").open("a") as file:
        file.write(OWN)
    (folder / "judge.yaml").write_text(JUDGE_FILE)


def said(folder, monkeypatch, *arguments):
    """The lines of a command before it builds anything."""
    monkeypatch.setattr(cli.HybridLightningCLI, "instantiate_classes", lambda self: sys.exit())
    lines = run(folder, *arguments).err.splitlines()
    return [line for line in lines if not line.startswith("config ")]


@pytest.mark.parametrize(
    ("config", "options", "part", "values", "lines"), SWITCHES, ids=[" ".join([Path(row[0]).stem, *row[1]]) for row in SWITCHES]
)
def test_a_class_keeps_what_means_the_same_and_a_line_says_so(folder, monkeypatch, config, options, part, values, lines):
    arguments = ["fit", "--config", config, *options]
    assert said(folder, monkeypatch, *arguments) == lines
    monkeypatch.chdir(folder)
    found = parse(arguments, monkeypatch).model.init_args[part].init_args
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize("config", ["gspo", "sft", "dpo", "tools", "smollm2_mawps", "evaluate"])
def test_a_config_in_place_of_the_commands_defaults_is_no_switch(folder, monkeypatch, config):
    assert said(folder, monkeypatch, "fit", "--config", f"{CONFIGS}/{config}.yaml", "--adapter.scorer=Random") == []


def test_other_processes_of_a_run_do_not_say_it_again(folder, monkeypatch):
    monkeypatch.setattr(cli.rank_zero_only, "rank", 1)
    assert said(folder, monkeypatch, "fit", "--config", GSPO, *JUDGE) == []


def test_parsers_of_others_keep_options_as_before():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardFunction)
    given = ["--reward={class_path: ExactMatch, init_args: {pattern: (x)}}", "--reward=FormatReward"]
    assert parser.parse_args(given).reward.init_args.pattern == "(x)"
