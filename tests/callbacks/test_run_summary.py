import contextlib
import csv
import io
import json
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_examples import fit, write_rows
from tiny_runs import StartsWithDigit, build_adapter, build_data, build_policy, build_trainer
from tiny_runs import fit as fit_policy

from hybrid_lightning.callbacks import RunSummary, StepTimer
from hybrid_lightning.export import MergedModel, policy_of_checkpoint
from hybrid_lightning.export.model_card import model_card

KEYS = {
    "changes",
    "accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "seconds", "training_seconds", "steps", "eval_samples",
    "full_modules", "lora_modules", "trainable_parameters", "trainable_share", "loss", "model", "validation", "run_folder",
    "checkpoint", "next_command", "seconds_by_phase", "throughput", "verdict", "try",
}  # fmt: skip


def run(model, sums, root, *callbacks, data=None, timed=True, **flags):
    policy = {"reward": StartsWithDigit(), "eval_samples": 4, "lr_lora": 0.1}
    callbacks = (*([StepTimer()] if timed else []), RunSummary(), build_adapter(), *callbacks)
    data = data or build_data(sums, validation_fraction=0.4)
    flags = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 4, "max_steps": 6, **flags}
    module = fit_policy(model, sums, root, *callbacks, policy=policy, data=data, **flags)
    return module, json.loads(next(root.rglob("summary.json")).read_text())


def validate(module, sums, root):
    (metrics,) = build_trainer(root).validate(module, datamodule=build_data(sums, validation_fraction=0.4), verbose=False)
    return metrics


@pytest.fixture(scope="module")
def whole(model, sums, tmp_path_factory):
    """The run folder, the policy, the summary, and what was on the screen."""
    root, output = tmp_path_factory.mktemp("whole"), io.StringIO()
    saver = ModelCheckpoint(save_last=True, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    with contextlib.redirect_stdout(output):
        module, summary = run(model, sums, root, saver, enable_checkpointing=True)
    return root / "version_0", module, summary, output.getvalue()


def test_accuracies_are_those_of_validations_before_and_after(model, sums, tmp_path, whole):
    _, module, summary, _ = whole
    before = validate(build_policy(model, reward=StartsWithDigit(), eval_samples=4), sums, tmp_path)
    after = validate(module, sums, tmp_path)
    for when, metrics in (("before", before), ("after", after)):
        assert summary[f"accuracy_{when}"] == pytest.approx(metrics["val/avg@4"])
        assert summary[f"greedy_{when}"] == pytest.approx(metrics["val/greedy_accuracy"])
        assert summary["validation"][when] == pytest.approx(metrics)
    assert summary["accuracy_before"] > 0 and summary["validation"]["after"] != summary["validation"]["before"], "it was trained"


def test_all_values(model, whole):
    root, module, summary, _ = whole
    assert summary.keys() == KEYS
    share = pytest.approx(module.plan.trainable_parameters() / module.base_parameters, abs=1e-6)
    expected = {"full_modules": list(module.plan.full_modules), "lora_modules": 11, "steps": 6, "eval_samples": 4}
    expected |= {"trainable_parameters": module.plan.trainable_parameters(), "trainable_share": share, "loss": "GRPOLoss"}
    expected |= {"model": str(model), "run_folder": str(root), "checkpoint": str(root / "checkpoints" / "last.ckpt")}
    expected["next_command"] = ""  # from Python there is no config that a command could name
    assert expected.items() <= summary.items() and summary["seconds"] > summary["training_seconds"] > 0


def test_the_screen_says_what_happened_and_where_the_time_went(whole):
    root, _, summary, output = whole
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert f"{before:.1%} -> {after:.1%} ({100 * (after - before):+.1f} points)" in output
    assert [output.count(f"Validation ({when})") for when in ("start", "step 4", "step 6")] == [1, 1, 1]
    assert f"Run folder: {root}" in output and "Curves:" not in output, "there is no logger"
    assert "Next:" not in output and "hybrid_lightning" not in output, "from Python there is no command"
    assert re.search(r"^Checkpoint: (.+)$", output, re.MULTILINE)[1] == summary["checkpoint"]
    output = " ".join(output.replace("│", " ").split())
    assert f"{summary['seconds']:.0f} s for 6 optimizer steps: generate " in output
    for name, seconds in summary["seconds_by_phase"].items():
        share = seconds / summary["seconds"]
        assert (f" {name} {share:.0%}" in output) == (share >= 0.005), name
    assert f"tokens/s: prompts and completions {summary['throughput']['tokens_per_second']:,.0f}, generation" in output


def test_without_a_timer_there_is_the_time_alone_and_of_a_part_of_a_validation_no_accuracy(model, sums, tmp_path, capsys):
    data = build_data(sums, validation_fraction=0.4)
    data.eval_batch_size = 4
    _, summary = run(model, sums, tmp_path, data=data, max_steps=4, timed=False, num_sanity_val_steps=1)
    assert summary.keys() == KEYS and summary["seconds_by_phase"] == summary["throughput"] == {} and summary["seconds"] > 0
    assert summary["accuracy_before"] is None and summary["accuracy_after"] is not None
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "s for 4 optimizer steps, scoring and validation included" in output and "tokens/s" not in output
    assert output.count("Validation (step 4)") == 1, "the last step is validated once"


def test_measurements_and_times_add_up_over_stops(model, sums, tmp_path, whole):
    root, module, summary, _ = whole
    _, resumed = run(model, sums, tmp_path, ckpt=root / "checkpoints" / "step=4.ckpt")
    assert resumed["validation"] == summary["validation"] and resumed["steps"] == 6
    for result in (summary, resumed):
        phases = result["seconds_by_phase"]
        assert sum(phases.values()) == pytest.approx(result["seconds"], rel=0.02)
        assert min(phases[name] for name in ("generate", "update", "validation", "scoring", "startup")) > 0
        assert all(rate > 0 for rate in result["throughput"].values()) and len(result["throughput"]) == 3
    # The validation after step 4 and two steps are done anew.
    assert resumed["seconds_by_phase"]["scoring"] == pytest.approx(summary["seconds_by_phase"]["scoring"], abs=1e-3)
    assert resumed["seconds_by_phase"]["startup"] > summary["seconds_by_phase"]["startup"]
    content = torch.load(root / "checkpoints" / "step=4.ckpt", weights_only=True)
    (state,) = [value for key, value in content["callbacks"].items() if key.startswith("RunSummary")]
    assert 0 < state["seconds"] <= min(summary["seconds"], resumed["seconds"])
    assert any(layer.training for layer in module.modules()), "the validation after the last step leaves training mode"


def test_a_finished_run_that_is_resumed_says_only_what_it_knows(model, sums, tmp_path, whole):
    root, _, summary, _ = whole
    _, resumed = run(model, sums, tmp_path / "a", ckpt=root / "checkpoints" / "last.ckpt")
    assert resumed["validation"] == {"before": summary["validation"]["before"], "after": {}}, "saved before the last validation"
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    _, whole = run(model, sums, tmp_path / "b", saver, enable_checkpointing=True)
    _, resumed = run(model, sums, tmp_path / "c", ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed["validation"] == whole["validation"] and len(whole["validation"]["after"]) > 4


@pytest.mark.parametrize(("flags", "fraction"), [({"limit_val_batches": 0}, 0.4), ({}, 0.0)])
def test_without_validation_there_are_nulls(model, sums, tmp_path, flags, fraction, capsys):
    _, summary = run(model, sums, tmp_path, data=build_data(sums, validation_fraction=fraction), max_steps=2, **flags)
    assert [summary[f"{kind}_{when}"] for kind in ("accuracy", "greedy") for when in ("before", "after")] == [None] * 4
    assert summary["steps"] == 2 and "not measured -> not measured" in capsys.readouterr().out


def test_preferences_have_nothing_before_training_that_could_be_gained_upon(model, tmp_path, capsys):
    """The policy is its own reference there: no margin is above 0, by construction."""
    rows = write_rows(tmp_path / "rows.jsonl")
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    flags = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    callbacks = (RunSummary(), saver)
    fit("preference", model, rows, tmp_path, *callbacks, enable_checkpointing=True, logger=CSVLogger(tmp_path, "x"), **flags)
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    folder = tmp_path / "x" / "version_0"
    validation = json.loads((folder / "summary.json").read_text())["validation"]
    share = validation["after"]["val/rewards/accuracies"]
    assert f"preferred as chosen {share:.1%} of pairs, more than at the start (chance: 50%)" in output
    assert validation["before"]["val/rewards/accuracies"] is None and validation["before"]["val/rewards/margins"] == 0
    start, end = (re.search(rf"Validation \({when}\): (.*?)(?:Validation|What)", output)[1] for when in ("start", "step 2"))
    assert "rewards/accuracies" not in start and "rewards/margins 0.000" in start and "rewards/accuracies" in end
    logged = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/rewards/accuracies"]]
    assert float(logged[0]["val/rewards/accuracies"]) == 0, "the loggers have what TRL has"
    card = model_card(policy_of_checkpoint(tmp_path / "saved" / "last.ckpt"), MergedModel())
    assert re.search(r"`val/rewards/accuracies` \| - \| \d", card)
