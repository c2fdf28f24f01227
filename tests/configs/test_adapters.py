"""Every adapter overlay goes over a hybrid config and trains what it says."""

import json
from pathlib import Path

import pytest
from cli_runs import run

from hybrid_lightning.adapters.plan import AdapterPlan

OVERLAYS = {path.stem: path for path in (Path(__file__).parents[2] / "configs" / "adapter").glob("*.yaml")}
SHORT = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--model.sampler.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("name", "full", "dora"), [("full", 1, False), ("lora", 0, False), ("dora", 0, True), ("lora_mlp", 0, False)]
)
def test_an_overlay_trains_all_modules_one_way(folder, name, full, dora):
    result = run(
        folder, "fit", "--config", "t.yaml", "--config", OVERLAYS[name], *SHORT, f"--trainer.logger.init_args.name={name}"
    )
    assert result.code == 0, result.err
    root = folder / "runs" / name / "version_0"
    plan = AdapterPlan.load(root / "plan.json")
    assert len(plan.full_modules) == full * len(plan.candidates) and plan.lora.use_dora is dora
    ranks = {module.name: plan.lora_of(module).rank for module in plan.candidates if module.mode == "lora"}
    attention = {name: rank for name, rank in ranks.items() if ".self_attn." in name}
    assert set(attention.values()) <= {1 if name == "lora_mlp" else plan.lora.rank}
    assert {rank for name, rank in ranks.items() if name not in attention} <= {plan.lora.rank} and plan.lora.rank > 1
    assert json.loads((root / "summary.json").read_text())["steps"] == 1


def test_every_overlay_is_run():
    assert set(OVERLAYS) == {"full", "lora", "dora", "lora_mlp"}
