"""Runs end with the verdict that a person would give: of rewards of zeros, ones, noise, one answer for all, and a graded one."""

import contextlib
import io
import json
import re

import pytest
import torch
from tiny_runs import Constant, build_adapter, build_data, fit

from hybrid_lightning.callbacks import Diagnosis, RunReport, RunSummary
from hybrid_lightning.metrics import Difference
from hybrid_lightning.reports.page import ReportedRun, charted
from hybrid_lightning.reports.verdict import most_frequent
from hybrid_lightning.rewards import RewardFunction


class Noise(RewardFunction):
    """Whatever comes."""

    def __call__(self, completions, prompts):
        return torch.rand(len(completions)).tolist()


class Short(RewardFunction):
    """At most 0.9, for ending early: nothing is ever right."""

    def __call__(self, completions, prompts):
        return [0.9 * (1 - len(text) / 6) for text in completions]


class First(RewardFunction):
    """The first character is the answer; the most frequent one is paid everywhere."""

    def extract_answer(self, completion, prompt):
        return completion[:1] or None

    def __call__(self, completions, prompts):
        pairs = zip(completions, prompts, strict=True)
        return [1.0 if text[:1] == prompt.answer else 0.5 * (text[:1] == "4") for text, prompt in pairs]


@pytest.fixture(scope="module")
def mostly_fours(tmp_path_factory):
    rows = [{"question": f"{i // 5}+{i % 5}=", "answer": "4" if i % 3 else str(i % 5)} for i in range(40)]
    path = tmp_path_factory.mktemp("rows") / "fours.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    # With these rates, thirty other seeds give the same verdict (of noise 28, its interval being of 95%); so do other processors.
    ("reward", "steps", "rate", "said"),
    [
        (Constant(0.0), 4, 0.03, "nothing was learned: no step had a gradient, since every completion earned 0"),
        (Constant(1.0), 4, 0.03, "nothing was learned: no step had a gradient, since every completion earned 1"),
        (
            Noise(),
            4,
            1e-4,
            r"no change that is larger than its interval: accuracy \+0\.0 points \[.*\] on 16 problems, "
            r"reward [+-]0\.\d+ \[-.*, \+.*\]",
        ),
        (First(), 50, 0.01, r"one answer to most problems, which is not learning: '4' to \d+ of 16, right for \d+"),
        (Short(), 12, 0.03, r"learned: reward \+0\.\d+ \[\+.*, \+.*\] on 16 problems, while accuracy did not move"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RewardFunction) else None,
)
def test_a_run_ends_with(reward, steps, rate, said, model, mostly_fours, tmp_path):
    policy = {"reward": reward, "lr_lora": rate, "prompts_per_rollout": 8, "samples_per_prompt": 16, "eval_samples": 4}
    data = build_data(mostly_fours, validation_fraction=0.4)
    flags = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": steps, "max_steps": steps}
    callbacks = (RunSummary(), Diagnosis(), RunReport(), build_adapter())
    with contextlib.redirect_stdout(io.StringIO()) as output:
        fit(model, mostly_fours, tmp_path, *callbacks, policy=policy, data=data, logger=True, **flags)
    (summary,) = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert re.fullmatch(said, summary["verdict"])
    said = " ".join(output.getvalue().replace("│", " ").split())
    before, after = (summary[f"reward_{when}"] for when in ("before", "after"))
    assert f"{before:.3f} -> {after:.3f} ({after - before:+.3f} [" in said
    assert ", n=16" in said and "constant answer '4' for every problem would be right for 75.0%" in said
    run = ReportedRun.read(next(tmp_path.rglob("report.json")).parent)
    assert charted([run])[:2] == ["val/reward", "val/avg@4"] and "reward" in run.change()
    cut, right = (summary["validation"]["after"][f"val/{name}"] for name in ("truncation_rate", "avg@4"))
    assert any("max_new_tokens" in advice for advice in summary["try"]) == (cut - right >= 0.5)
    assert ("cut at max_new_tokens=6" in said) == (getattr(reward, "value", 0) < 1), "all right is not cut before"


UP, SAME, DOWN = (Difference(*values, 8) for values in ((0.2, 0.1, 0.3), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)))


@pytest.mark.parametrize(
    ("accuracy", "reward", "losses", "said", "tried"),
    [
        (UP, SAME, None, "learned: accuracy +20.0 points [+10.0, +30.0] on 8 problems, reward +0.100 [-0.100, +0.300]", ""),
        (SAME, UP, None, "learned: reward +0.200 [+0.100, +0.300] on 8 problems, while accuracy did not move", ""),
        (None, UP, None, "learned: reward +0.200 [+0.100, +0.300] on 8 problems", ""),
        (
            DOWN,
            UP,
            None,
            "worse than at the start: accuracy -20.0 points [-30.0, -10.0] on 8 problems, though reward",
            "lower model.lr",
        ),
        (
            SAME,
            SAME,
            None,
            "no change that is larger than its interval: accuracy +10.0 points [-10.0, +30.0] on 8 problems, ",
            "train longer",
        ),
        (None, None, (2.0, 1.9), "learned: held-out loss 2.0000 -> 1.9000", ""),
        (None, None, (1.9, 2.0), "worse than at the start: held-out loss 1.9000 -> 2.0000", "lower model.lr"),
        (None, None, None, "not measured, since there is no validation before and after", ""),
    ],
)
def test_accuracy_decides_then_the_reward_then_the_loss(accuracy, reward, losses, said, tried):
    text, tries = Diagnosis().verdict(accuracy, reward, losses)
    assert text.startswith(said) and [advice[: len(tried)] for advice in tries] == [tried] * bool(tried)


@pytest.mark.parametrize(
    ("given", "one"),
    [
        ([("4", True, "4")] * 6 + [("4", False, "3")] * 2, True),
        ([("4", True, "4")] * 8, False),  # no problem has another answer
        ([("4", True, "4")] * 6 + [("4", False, "3")] + [("3", True, "3")], False),  # one of the two others is right
        ([("4", False, "3"), ("3", False, "4")] * 4, False),
        ([(None, False, "3"), (None, False, "4")] * 4, False),  # no answer is not one answer
    ],
)
def test_one_answer_is_given_wrongly_to_most_of_the_problems_that_have_another(given, one):
    answers = most_frequent(given)
    said = "one answer to most problems, which is not learning: '4' to 8 of 8, right for 6" if one else ""
    assert answers["one_answer"] == said and most_frequent([("4", True, None)]) == {}
    text, tries = Diagnosis().verdict(UP, UP, None, said)
    assert text == said or not one
    assert [advice.endswith(" explain one-answer-to-most-problems)") for advice in tries] == [True] * one
    text, tries = Diagnosis().verdict(SAME, DOWN, None, said, "the engine is off by 0.05 nats")
    assert text == "completions were made by other weights than the policy's: the engine is off by 0.05 nats"
    assert len(tries) == 1 and tries[0].startswith("start the engine again")
