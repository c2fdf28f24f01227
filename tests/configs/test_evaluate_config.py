"""The config of evaluation alone takes a model and rows, and nothing else."""

import json

from cli_runs import command, parse
from test_configs import ROOT

from hybrid_lightning import data

EVALUATE = ["--config", str(ROOT / "configs" / "evaluate.yaml")]
SMALL = ["--model.sampler.max_new_tokens=5", "--model.eval_samples=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SMALL += ["--trainer.enable_progress_bar=false"]
SETS = """
data:
  source:
    class_path: Mixture
    init_args:
      sources:
        quiz: {class_path: FileSource, init_args: {test: rows.jsonl}}
        riddles: {class_path: FileSource, init_args: {test: rows.jsonl, max_rows: 2}}
"""


def test_a_model_and_rows_are_enough_and_several_named_sets_go_over_it(tiny, here, monkeypatch, capsys):
    (here / "rows.jsonl").write_text("".join(f'{{"question": "{n} + 1?", "answer": {n + 1}}}\n' for n in range(3)))
    (here / "sets.yaml").write_text(SETS)
    command(["test", *EVALUATE, f"--model.model={tiny}", "--data.source.test=rows.jsonl", *SMALL], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_0" / "evaluation.json").read_text())
    assert report["model"] == str(tiny) and report["overall"]["problems"] == 3 and report["sets"] == {}
    assert {"avg@2", "pass@2", "maj@2", "greedy_accuracy/ci_high"} < report["overall"].keys()
    assert "adapter plan" not in capsys.readouterr().out.lower() and not list(here.rglob("plan.json")), "nothing is adapted"
    command(["test", *EVALUATE, "--config", "sets.yaml", f"--model.model={tiny}", *SMALL], monkeypatch)
    report = json.loads((here / "runs" / "evaluate" / "version_1" / "evaluation.json").read_text())
    assert {name: values["problems"] for name, values in report["sets"].items()} == {"quiz": 3, "riddles": 2}


def test_the_benchmarks_have_a_reward_and_a_format_each_and_nothing_to_train_on(here, monkeypatch):
    overlay = ["--config", str(ROOT / "configs" / "evaluation" / "benchmarks.yaml")]
    parsed = parse(["test", *EVALUATE, *overlay], monkeypatch)
    source, layout = parsed.data.init_args.source.init_args, parsed.data.init_args.format.init_args
    assert source.sources.keys() == layout.formats.keys() == parsed.model.init_args.reward.init_args.rewards.keys()
    for part in source.sources.values():
        kind = getattr(data, part.class_path.rpartition(".")[2])
        splits = {parameter for parameter, _ in kind(**part.init_args).hub_splits}
        assert splits == {"test_split"}, "nothing to train on, and nothing to validate on"
    assert parsed.model.init_args.sampler.init_args.max_new_tokens == 8192
