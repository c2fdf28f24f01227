"""The comparison of two checkouts: its table, and by which package and worker each side runs."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import yaml

from benchmarks.commands import ROOT
from benchmarks.speed import commits, run_config
from benchmarks.workloads import Settings
from hybrid_lightning.cli.main import HybridLightningCLI


def test_the_table_has_medians_and_the_ratio_of_neighbouring_steps(monkeypatch, capsys):
    """With measurements that are given; `benchmarks/pairs.py` makes them as for the comparison with TRL."""
    times = {"before": [9.0, 1.0, 2.0, 4.0], "now": [9.0, 1.1, 2.0, 5.0]}  # the first is not counted
    steps = {side: [{"seconds": value, "processor_seconds": 2 * value} for value in values] for side, values in times.items()}
    monkeypatch.setattr(commits, "prepared", lambda workloads, plan: nullcontext(workloads))
    monkeypatch.setattr(commits, "compare", lambda workload, prepared, plan: {"steps": steps})
    assert commits.main([str(ROOT), "--workload", "tiny"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| `tiny` | seconds | 2.000 | 2.000 | 1.100 (")
    assert rows[1].startswith("| `tiny` | processor seconds | 4.000 | 4.000 | 1.100 (")


def test_shipped_configs_have_the_sizes_that_are_checked():
    for workload in commits.SHIPPED.values():
        model = yaml.safe_load((ROOT / "configs" / f"{workload.name}.yaml").read_text())["model"]
        sampler = model["sampler"].get("init_args", model["sampler"])
        sizes = (model["prompts_per_rollout"], model["samples_per_prompt"], sampler["max_new_tokens"])
        assert sizes == (workload.prompts, workload.samples, workload.max_new_tokens)
        assert model.get("minibatches_per_rollout", 1) == workload.minibatches
        assert model.get("episodes", {"init_args": {"max_turns": 1}})["init_args"]["max_turns"] == workload.turns


def test_a_config_is_run_by_the_package_of_a_checkout(monkeypatch, tmp_path):
    """As far as the command line reads it."""
    found = []

    def before_instantiate_classes(cli):
        found.append((cli.config[cli.subcommand], cli.trainer_defaults["callbacks"]))
        raise StopIteration

    monkeypatch.setattr(HybridLightningCLI, "before_instantiate_classes", before_instantiate_classes)
    monkeypatch.setattr("hybrid_lightning.process.prepare_process", lambda: None)
    monkeypatch.setattr("benchmarks.worker.Gate", lambda settings: settings)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["", Settings(commits.SHIPPED["smollm2_mawps"], tmp_path, "cpu", 1, 3, 0).as_argument()])
    with pytest.raises(StopIteration):
        run_config.main(str(ROOT), ["--model.dtype=float32", "--trainer.precision=32-true"])
    ((config, (gated,)),) = found
    assert config.trainer.max_steps == gated.gate.rollouts == 3 and config.trainer.limit_val_batches == 0
    assert config.trainer.precision == "32-true", "as was given"
    assert "/rows.jsonl" in str(config.data), "in the place of those that are not there"
    with pytest.raises(AssertionError, match=str(ROOT)):
        run_config.main(str(tmp_path))


def test_each_side_runs_the_worker_of_its_own_checkout(tmp_path):
    worker = tmp_path / "benchmarks" / "speed" / "run_ours.py"
    worker.parent.mkdir(parents=True)
    worker.write_text("import hybrid_lightning, sys; print(hybrid_lightning.NAME, sys.argv[1])")
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "hybrid_lightning.py").write_text("NAME = 'its own'")
    code = commits._WORKER.format(checkout=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code, "given"], capture_output=True, text=True, check=False)
    assert done.stdout == "its own given\n", done.stderr
