import contextlib
import csv
import io
import json
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_examples import fit, write_rows
from tiny_runs import StartsWithDigit, build_data, build_policy, build_trainer

from hybrid_lightning.callbacks import EvaluationReport, ModelCheckpoint, RunSummary
from hybrid_lightning.callbacks.compare_runs import compare
from hybrid_lightning.rewards import RewardFunction


def test_accuracies_come_from_the_validations_before_and_after(model, sums, tmp_path, finished):
    summary = finished.summary
    data, start = build_data(sums, validation_fraction=0.4), build_policy(model, reward=StartsWithDigit(), eval_samples=4)
    for when, module in (("before", start), ("after", finished.policy)):
        (metrics,) = build_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
        assert summary[f"accuracy_{when}"] == pytest.approx(metrics["val/avg@4"])
        assert summary[f"greedy_{when}"] == pytest.approx(metrics["val/greedy_accuracy"])
        assert summary[f"reward_{when}"] == pytest.approx(metrics["val/reward"])
        assert summary["validation"][when] == pytest.approx(metrics)
    assert summary["accuracy_before"] > 0 and summary["validation"]["after"] != summary["validation"]["before"], "it was trained"


def test_all_values(model, finished):
    root, module, summary = finished.folder, finished.policy, finished.summary
    share = pytest.approx(module.plan.trainable_parameters() / module.policy.base_parameters, abs=1e-6)
    expected = {"full_modules": list(module.plan.full_modules), "lora_modules": 11, "steps": 6, "eval_samples": 4}
    expected |= {"trainable_parameters": module.plan.trainable_parameters(), "trainable_share": share, "loss": "GRPOLoss"}
    expected |= {"model": str(model), "run_folder": str(root), "checkpoint": str(root / "checkpoints" / "last.ckpt")}
    expected["next_command"] = ""  # a run from Python has no config that a command could name
    assert expected.items() <= summary.items() and summary["seconds"] > summary["training_seconds"] > 0


def test_the_screen_says_what_happened_and_where_the_time_went(finished):
    root, summary, output = finished.folder, finished.summary, finished.output
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    low, high = (f"{100 * summary['differences']['accuracy'][end]:+.1f}" for end in ("low", "high"))
    assert f"{before:.1%} -> {after:.1%} ({100 * (after - before):+.1f} points [{low}, {high}])" in output
    assert [output.count(f"Validation ({when})") for when in ("start", "step 4", "step 6")] == [1, 1, 1]
    assert f"Run folder: {root}" in output and f"Curves:     tensorboard --logdir {root}" in output
    assert "Next:" not in output and "hybrid_lightning" not in output, "a run from Python shows no command"
    assert re.search(r"^Checkpoint: (.+)$", output, re.MULTILINE)[1] == summary["checkpoint"]
    output = " ".join(output.replace("│", " ").split())
    assert f"{summary['seconds']:.0f} s for 6 optimizer steps: generate " in output
    for name, seconds in summary["seconds_by_phase"].items():
        share = seconds / summary["seconds"]
        assert (f" {name} {share:.0%}" in output) == (share >= 0.005), name
    assert f"tokens/s: prompts and completions {summary['throughput']['tokens_per_second']:,.0f}, generation" in output


def test_without_a_timer_there_is_the_time_alone_and_of_a_part_of_a_validation_no_accuracy(measured, sums, tmp_path):
    data = build_data(sums, validation_fraction=0.4)
    data.eval_batch_size = 4
    flags = {"data": data, "max_steps": 2, "timed": False, "val_check_interval": 2}
    run = measured(tmp_path / "a", num_sanity_val_steps=1, **flags)
    summary, output = run.summary, " ".join(run.output.replace("│", " ").split())
    assert summary["seconds_by_phase"] == summary["throughput"] == {} and summary["seconds"] > 0
    assert summary["accuracy_before"] is None and summary["accuracy_after"] is not None
    assert "s for 2 optimizer steps, scoring and validation included" in output and "tokens/s" not in output
    assert output.count("Validation (step 2)") == 1, "the last step is validated once"
    run = measured(tmp_path / "b", limit_val_batches=0, **flags)
    assert [run.summary[f"{kind}_{when}"] for kind in ("accuracy", "greedy") for when in ("before", "after")] == [None] * 4
    assert run.summary["steps"] == 2 and "not measured -> not measured" in run.output


class Style(RewardFunction):
    """Graded as by a judge of style: nothing is ever right, though some earn 1."""

    measures_correctness = False

    def __call__(self, completions, prompts):
        return [min(1.0, sum(letter.isdigit() for letter in text) / 3) for text in completions]


def test_where_nothing_measures_correctness_nothing_shows_an_accuracy(measured, sums, tmp_path):
    saver = ModelCheckpoint(monitor="val/avg@4", mode="max")
    run = measured(tmp_path, saver, enable_checkpointing=True, max_steps=4, reward=Style)
    compare([str(run.folder)] * 2, str(tmp_path / "compared.html"))
    assert saver.monitor == "val/reward" and "by val/reward, since no part of the reward measures correctness" in run.output
    accuracies = re.compile(r"accura|avg@|pass@|maj@|solve_rate|greedy_acc|\bgreedy\b(?!_)|constant answer|before they are right")
    said = [run.output.replace("there is no val/avg@4", ""), (run.folder / "report.html").read_text()]
    said += [(tmp_path / "compared.html").read_text(), " ".join(map(str, run.policy.evaluation.last[""]))]
    assert [accuracies.search(text) for text in said] == [None] * 4
    assert not re.search(r">(right|wrong)</span>", said[1]), "samples"
    logged = EventAccumulator(str(run.folder)).Reload().Tags()["scalars"]
    assert "val/reward" in logged and not list(filter(accuracies.search, logged))
    summary = {name: value for name, value in run.summary.items() if name.startswith(("accuracy", "greedy")) or name == "answers"}
    assert not any(summary.values()) and run.summary["reward_after"] is not None and "reward" in run.summary["verdict"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        trainer = build_trainer(tmp_path, EvaluationReport(), logger=CSVLogger(tmp_path, name="csv"))
        trainer.validate(run.policy, datamodule=build_data(sums, validation_fraction=0.4), verbose=False)
    assert "truncation_rate" in output.getvalue() and not accuracies.search(output.getvalue())


def test_measurements_and_times_add_up_over_stops(finished, resumed):
    policy, summary, resumed = finished.policy, finished.summary, resumed.summary
    assert resumed["validation"] == summary["validation"] and resumed["steps"] == 6
    for result in (summary, resumed):
        phases = result["seconds_by_phase"]
        assert sum(phases.values()) == pytest.approx(result["seconds"], rel=0.02)
        assert min(phases[name] for name in ("generate", "update", "validation", "scoring", "startup")) > 0
        assert all(rate > 0 for rate in result["throughput"].values()) and len(result["throughput"]) == 3
    assert resumed["seconds_by_phase"]["scoring"] == pytest.approx(summary["seconds_by_phase"]["scoring"], abs=1e-3)
    assert resumed["seconds_by_phase"]["startup"] > summary["seconds_by_phase"]["startup"]
    content = torch.load(finished.folder / "checkpoints" / "step=2.ckpt", weights_only=True)
    (state,) = [value for key, value in content["callbacks"].items() if key.startswith("RunSummary")]
    assert 0 < state["seconds"] <= min(summary["seconds"], resumed["seconds"])
    assert any(layer.training for layer in policy.modules()), "the validation after the last step leaves training mode"


def test_a_finished_run_that_is_resumed_says_only_what_it_knows(measured, tmp_path, finished):
    found = measured(tmp_path / "a", ckpt=finished.folder / "checkpoints" / "last.ckpt").summary["validation"]
    assert found == {"before": finished.summary["validation"]["before"], "after": {}}, "saved before the last validation"
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    whole = measured(tmp_path / "b", saver, enable_checkpointing=True, max_steps=1).summary["validation"]
    found = measured(tmp_path / "c", ckpt=tmp_path / "checkpoints" / "last.ckpt", max_steps=1).summary["validation"]
    assert found == whole and len(whole["after"]) > 4


def test_preferences_have_nothing_before_training_that_could_be_gained_upon(model, tmp_path, capsys):
    """The policy is its own reference there: no margin is above 0, by construction."""
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    fit("preference", model, rows, tmp_path, RunSummary(), logger=CSVLogger(tmp_path, "x"), **flags)
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    folder = tmp_path / "x" / "version_0"
    validation = json.loads((folder / "summary.json").read_text())["validation"]
    share = validation["after"]["val/rewards/accuracies"]
    assert f"preferred as chosen {share:.1%} of pairs, compared with the start policy (chance: 50%)" in output
    assert validation["before"]["val/rewards/accuracies"] is None and validation["before"]["val/rewards/margins"] == 0
    start, end = (re.search(rf"Validation \({when}\): (.*?)(?:Validation|What)", output)[1] for when in ("start", "step 2"))
    assert "rewards/accuracies" not in start and "rewards/margins 0.000" in start and "rewards/accuracies" in end
    logged = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/rewards/accuracies"]]
    assert float(logged[0]["val/rewards/accuracies"]) == 0, "the loggers have what TRL has"
