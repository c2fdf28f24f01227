"""The command line, in this process: actions and output of every command, with rewards and with given completions."""

import contextlib
import gc
import io
import json
import logging
import re

import pytest
from cli_runs import done, run

from hybrid_lightning.adapters import AdapterPlan

# All lines that `fit` and `test` may print; tables stand in frames of their own.
FIT = re.compile(
    r"Adapter plan: |[┏┃┡│└]|Plan(, with \d+ more modules?,)? written to |Validation \((start|step \d+)\): |What happened"
    r"|[┌├]|Run folder: |Curves: |Report: |Next: |Verdict: |Try: |Warning: .* \(hybrid-lightning explain "
    r"|(Calibration rollouts|Scoring modules|Validation before training|Step \d|Validation) \.\.\.$"
    r"|Step \d/4: reward .* loss .* entropy |  .* -> .* \(reward \S+\)"
)
EVALUATION = re.compile(r"Test|[┌│└├]|Shares in percent|Measured by |Written to ")
LOGGED = re.compile(r"model runner: |Loaded model weights from the checkpoint at \S+$")


def quiet(folder, pattern, *arguments):
    """Runs a command: it prints only lines that match, and at most two log lines (the fast passes, the loaded weights)."""
    text = io.StringIO()
    handler, loggers = logging.StreamHandler(text), [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        result = done(folder, *arguments)
    logged = text.getvalue().splitlines()
    others = [line for line in result.out.splitlines() if not pattern.match(line)]
    others += [line for line in result.err.splitlines() if line not in logged]
    assert not others and len(logged) <= 2 and all(map(LOGGED.match, logged)), (others, logged)
    return result.out


@pytest.fixture(scope="module")
def fitted(folder):
    """A run, and its output."""
    options = ["--trainer.logger.init_args.name=whole", "--trainer.enable_progress_bar=null"]
    return folder / "runs" / "whole" / "version_0", quiet(folder, FIT, "fit", "--config", "t.yaml", *options)


def summary_of(root):
    return json.loads((root / "summary.json").read_text())


def of_run(root):
    """Arguments for a command on the last checkpoint of a run, by the run's own config."""
    return ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt"]


def test_each_line_of_a_run_informs(folder, fitted):
    root, out = fitted
    shown = re.findall(r"Validation \(.*\n(  .* -> .*\n)(  .* -> .*\n)", out)
    assert len(shown) == 3 and all(len(line) <= 81 for lines in shown for line in lines), "no wider than a screen"
    assert out.count("Validation (") == 3 and len(re.findall(r"\nStep \d/", out)) == 4, "a file has no progress bar"
    assert re.search(r"\nNext: .*\nVerdict: .*(\nTry: .*)*\n\Z", out)
    quiet(folder, EVALUATION, "test", *of_run(root))


def test_garbage_collections_skip_what_stays(folder, monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(gc, "enable", lambda: frozen.append("a command runs"))
    done(folder, "fit", "--config", "t.yaml", "--trainer.max_steps=1", "--trainer.logger.init_args.name=frozen")
    assert len(frozen) == 3 and frozen[1] == "a command runs", "once before the command, and once before its first step"


def test_a_checkpoint_is_evaluated_by_the_runs_own_config_and_predicts(folder, fitted, tmp_path):
    """By `test`, which the run names, in `test_display`."""
    root, _ = fitted
    out = done(folder, "validate", *of_run(root), "--trainer.logger.init_args.version=again").out
    assert "greedy_accuracy" in out and "confidence intervals" in out and "validate/avg@2" not in out
    report = json.loads((root.parent / "again" / "evaluation.json").read_text())
    assert report["checkpoint"] == str(root / "checkpoints" / "last.ckpt") and report["overall"]["problems"] == 8
    assert report["overall"]["avg@2"] == pytest.approx(summary_of(root)["accuracy_after"])
    done(folder, "predict", *of_run(root), f"--predictions.path={tmp_path}/p.jsonl", "--trainer.logger=false")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(records) == 8 and {len(record["completions"]) for record in records} == {2}


def test_score_makes_the_plan_that_fit_would(folder, fitted):
    result = done(folder, "score", "--config", "t.yaml", "--trainer.logger.init_args.name=score")
    scored = folder / "runs" / "score" / "version_0"
    assert AdapterPlan.load(scored / "plan.json").digest == AdapterPlan.load(fitted[0] / "plan.json").digest
    assert (scored / "plan.png").is_file() and "Adapter plan: 1 fully trained" in result.out
    assert not (scored / "checkpoints").exists() and not (scored / "summary.json").exists()
    options = ["--adapter.budget.share=0", "--trainer.logger.init_args.name=lora"]
    first, *rest = quiet(folder, re.compile(""), "score", "--config", "t.yaml", *options).splitlines()
    assert re.match(r"Adapter plan: 0 fully trained, \d+ with LoRA of rank 2; [\d,]+ trainable parameters", first)
    assert rest == ["Plan written to runs/lora/version_0/plan.json"], "no table where all modules are alike"


# ---- given completions, and a policy that reinforcement learning starts from


@pytest.fixture(scope="module")
def shown(folder):
    """A supervised run with a reward that it does not learn from."""
    options = ["--model.reward=my_parts.StartsWithDigit", "--model.sampler.max_new_tokens=6", "--model.eval_samples=2"]
    options += ["--trainer.max_steps=40", "--trainer.val_check_interval=20", "--trainer.logger.init_args.name=shown"]
    return folder / "runs" / "shown" / "version_0", done(folder, "fit", "--config", "sft.yaml", *options).out


def test_it_learns_from_given_completions_and_says_so(shown):
    root, out = shown
    summary = summary_of(root)
    before, after = (summary["validation"][when] for when in ("before", "after"))
    assert summary["loss"] == "SupervisedLoss" and after["val/loss"] < before["val/loss"] - 0.5
    assert summary["greedy_after"] > summary["greedy_before"]
    assert f"{before['val/loss']:.4f} -> {after['val/loss']:.4f}" in out and "greedy accuracy" in out
    assert AdapterPlan.load(root / "plan.json").calibration["signal"] == "examples"


def test_reinforcement_learning_starts_where_it_ended(folder, shown):
    root, _ = shown
    done(folder, "export", *of_run(root), "--folder", "start", "--form=MergedModel", "--form.dtype=float32")
    card = (folder / "start" / "README.md").read_text()
    assert "rlvr" not in card and "examples_per_step: 8" in card
    short = ["--trainer.max_steps=1", "--adapter.scorer=Random"]
    done(folder, "fit", "--config", "t.yaml", "--model.model=start", "--trainer.logger.init_args.name=after", *short)
    after = summary_of(folder / "runs" / "after" / "version_0")
    assert after["loss"] == "GRPOLoss" and after["model"] == "start"
    assert after["greedy_before"] == pytest.approx(summary_of(root)["greedy_after"]) and after["greedy_before"] > 0.5


def test_a_run_without_a_reward_measures_the_loss_alone(folder, shown):
    result = done(folder, "fit", "--config", "sft.yaml")
    assert "held-out loss" in result.out and "accuracy" not in result.out
    result = done(folder, "test", "--config", "sft.yaml", "--ckpt_path", shown[0] / "checkpoints" / "last.ckpt")
    assert "loss" in result.out and "avg@2" not in result.out
    result = run(folder, "plan", "--config", "sft.yaml")
    assert result.code == 1 and "plan works only for PolicyModule, but model is a SupervisedModule" in result.last
