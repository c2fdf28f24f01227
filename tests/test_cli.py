"""The command line, in this process: a whole run with every command."""

import json

import pytest
from cli_runs import done

from hybrid_lightning.adapters import AdapterPlan


@pytest.fixture(scope="module")
def fitted(folder):
    done(folder, "fit", "--config", "t.yaml", "--checkpoint.save_top_k=-1", "--trainer.logger.init_args.name=whole")
    return folder / "runs" / "whole" / "version_0"


def summary_of(run_folder):
    return json.loads((run_folder / "summary.json").read_text())


def evaluated(folder, root, command, *options):
    """What a command on the last checkpoint says, by the run's own config."""
    arguments = ["--config", root / "config.yaml", "--ckpt_path", root / "checkpoints" / "last.ckpt", *options]
    result = done(folder, command, *arguments)
    return result.out


def test_a_checkpoint_is_evaluated_by_the_runs_own_config(folder, fitted):
    """By `test`, which the run names, in `test_display`."""
    out = evaluated(folder, fitted, "validate", "--trainer.logger.init_args.version=again")
    assert "greedy_accuracy" in out and "confidence intervals" in out and "validate/avg@2" not in out
    report = json.loads((fitted.parent / "again" / "evaluation.json").read_text())
    assert report["checkpoint"] == str(fitted / "checkpoints" / "last.ckpt") and report["overall"]["problems"] == 8
    assert report["overall"]["avg@2"] == pytest.approx(summary_of(fitted)["accuracy_after"])


def test_predict_writes_lines(folder, fitted, tmp_path):
    evaluated(folder, fitted, "predict", f"--predictions.path={tmp_path}/p.jsonl", "--trainer.logger=false")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(records) == 8 and {len(record["completions"]) for record in records} == {2}
    assert all(record["reward_parts"].keys() == {"starts_with_digit"} for record in records)


def test_score_makes_the_plan_that_fit_would_and_fit_takes_it(folder, fitted):
    result = done(folder, "score", "--config", "t.yaml", "--trainer.logger.init_args.name=score")
    scored = folder / "runs" / "score" / "version_0"
    assert AdapterPlan.load(scored / "plan.json").digest == AdapterPlan.load(fitted / "plan.json").digest
    assert (scored / "plan.png").is_file() and "Adapter plan: 1 fully trained" in result.out
    assert not (scored / "checkpoints").exists() and not (scored / "summary.json").exists()
    name = "--trainer.logger.init_args.name=planned"
    result = done(folder, "fit", "--config", "t.yaml", f"--adapter.plan={scored}/plan.json", name)
    again, before = (summary_of(folder / "runs" / path) for path in ("planned/version_0", "whole/version_0"))
    assert again["validation"] == before["validation"], "the same run, whether the plan was made before or within"
