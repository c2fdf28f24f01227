"""A run says what keeps it from learning, each thing once, and its summary ends with a verdict."""

import json
import re
from pathlib import Path

import pytest
from cli_runs import done, run
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.callbacks import Diagnosis
from hybrid_lightning.reports.findings import Finding

GSPO = Path(__file__).parents[2] / "configs" / "gspo.yaml"
BEFORE = {"val/avg@2": 0.4, "val/avg@2/ci_low": 0.3, "val/avg@2/ci_high": 0.5, "val/loss": 2.0}


def warnings_in(text):
    return [line.removeprefix("Warning: ") for line in text.splitlines() if line.startswith("Warning: ")]


def sections(text):
    return [re.search(r"\(docs/troubleshooting\.md#(.*)\)$", line)[1] for line in warnings_in(text)]


def test_a_reward_that_pays_nothing_is_said_before_the_first_step_and_at_the_end(folder):
    name = "--trainer.logger.init_args.name=nothing"
    steps = ["--trainer.max_steps=14", "--trainer.val_check_interval=14", "--trainer.enable_progress_bar=null"]
    with (folder / "my_parts.py").open("a") as file:
        file.write("\n\ndef nothing(completion):\n    return 0.0\n")
    reward = ["--model.reward=FunctionReward", f"--model.reward.function={folder}/my_parts.py:nothing"]
    result = done(folder, "fit", "--config", "t.yaml", name, *steps, *reward)
    first = ["completions-are-cut", "all-rewards-of-a-group-are-equal", "the-reference-answer-earns-nothing"]
    assert sections(result.out) == [*first, "no-gradient"], "each once"
    assert sections(result.out[: result.out.index("Step 1/14")]) == first
    assert "nothing is learned from the last 6 rollouts" in warnings_in(result.out)[-1]
    *_, summary = (folder / "runs" / "nothing").rglob("summary.json")
    summary = json.loads(summary.read_text())
    assert summary["verdict"] == "nothing was learned: no step had a gradient" and len(summary["try"]) == 4
    assert result.out.rstrip().splitlines()[-5:] == [
        f"Verdict:    {summary['verdict']}",
        *(f"Try:        {t}" for t in summary["try"]),
    ]
    lines = re.findall(r"^Step (\d+)/14: loss .* entropy [\d.]+ .*time/step_s [\d.]+$", result.out, re.MULTILINE)
    assert [int(line) for line in lines] == list(range(1, 15))


def test_a_rate_that_is_far_too_high_is_noticed_and_one_that_fits_is_not(folder):
    small = [
        "--model.prompts_per_rollout=8",
        "--adapter.budget.share=0",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
    ]
    small += ["--trainer.enable_progress_bar=false", "--data.validation_prompts=16"]
    high, fitting = (run(folder, "fit", "--config", GSPO, *small, f"--model.lr_lora={rate}") for rate in (0.3, 0.003))
    assert high.code == fitting.code == 0, high.err + fitting.err
    assert "the-policy-gets-worse" in sections(high.out) and "\nVerdict:    worse than at the start\nTry: " in high.out
    assert warnings_in(fitting.out) == []


def test_what_was_seen_and_said_goes_on_after_a_stop(model, sums, tmp_path, capsys):
    def go(steps, ckpt=None):
        policy, diagnosis = build_policy(model, reward=Constant()), Diagnosis()
        trainer = build_trainer(
            tmp_path, diagnosis, build_adapter(plan=tmp_path / "plan.json" if ckpt else None), max_steps=steps
        )
        trainer.fit(policy, datamodule=build_data(sums), ckpt_path=ckpt)
        return trainer, diagnosis

    trainer, _ = go(4)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    policy = trainer.lightning_module
    policy.plan.save(tmp_path / "plan.json")
    first = capsys.readouterr().out
    _, diagnosis = go(7, tmp_path / "stopped.ckpt")
    assert "no-gradient" not in sections(first) and sections(capsys.readouterr().out) == ["no-gradient"]
    assert diagnosis.verdict({}, {}, 2)[0] == "nothing was learned: no step had a gradient"


@pytest.mark.parametrize(
    ("after", "verdict", "tried"),
    [
        ({"val/avg@2": 0.6}, "learned", ""),
        ({"val/avg@2": 0.45}, "no change that is larger than the interval of the start", "train longer"),
        ({"val/avg@2": 0.2}, "worse than at the start", "lower model.lr_lora"),
        ({"val/loss": 1.9}, "learned", ""),
        ({"val/loss": 2.1}, "worse than at the start", "lower model.lr_lora"),
        ({}, "not measured, since there is no validation before and after", ""),
    ],
)
def test_the_verdict(after, verdict, tried):
    text, tries = Diagnosis().verdict(BEFORE, after, 2)
    assert text == verdict and [advice[: len(tried)] for advice in tries] == [tried] * bool(tried)
    diagnosis = Diagnosis()
    diagnosis.found["cut"] = Finding("cut", "seen", "raise it")
    assert diagnosis.verdict(BEFORE, after, 2)[1] == ["raise it (docs/troubleshooting.md#completions-are-cut)"]
