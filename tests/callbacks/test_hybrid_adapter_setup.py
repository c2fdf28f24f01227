"""A run's plan: where it comes from, that it is applied once and shown, and that the start policy does not change."""

import contextlib
import io
import json

import pytest
import torch
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer, fit

from hybrid_lightning.adapters import AdapterPlan, Random
from hybrid_lightning.callbacks import HybridAdapterSetup, StepTimer
from hybrid_lightning.callbacks.run_folder import run_folder
from hybrid_lightning.errors import HybridLightningError, PlanError
from hybrid_lightning.trainer import Trainer


@pytest.fixture(scope="module")
def scored(model, sums, pictures, tmp_path_factory):
    """A policy after the setup of a fit, its run folder, and what was on the screen."""
    root, adapter, output = tmp_path_factory.mktemp("scored"), build_adapter(), io.StringIO()
    with contextlib.redirect_stdout(output):
        policy = fit(model, sums, root, adapter, max_steps=0)
    return policy, root / "version_0", output.getvalue()


# ---- showing


def test_the_plan_is_written_and_its_best_modules_are_shown(scored):
    """On the screen the fully trained modules and the next ten, in the file all."""
    policy, folder, output = scored
    assert AdapterPlan.load(folder / "plan.json") == policy.plan
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    by_score = [module.name for module in sorted(policy.plan.candidates, key=lambda module: -module.score)]
    full = policy.plan.full_modules
    shown = {*full, *[name for name in by_score if name not in full][:10]}
    assert "3 fully trained, 11 with LoRA of rank 2" in output
    assert {name for name in by_score if f" {name} " in output} == shown and len(by_score) - len(shown) == 1
    assert f"Plan, with 1 more module, written to {folder}" in output.replace("\n", "")


def test_the_first_process_alone_shows_the_plan(scored, tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, adapter := build_adapter())
    plan = run_folder(trainer) / "plan.json"
    for rank in (1, 0):
        monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self, rank=rank: rank == 0))
        adapter.setup(trainer, scored[0], "fit")
        assert plan.exists() == (rank == 0)


# ---- where it comes from


def test_a_plan_file_is_used_without_scoring(model, sums, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(Constant, "__call__", None)  # no reward is asked
    content = {**scored[0].plan.to_dict(), "digest": None}
    for module in content["candidates"]:
        module["mode"] = "full" if module["name"].endswith("layers.1.mlp.up_proj") else "frozen"
    (tmp_path / "mine.json").write_text(json.dumps(content))
    adapter = HybridAdapterSetup(plan=str(tmp_path / "mine.json"))
    policy = fit(model, sums, tmp_path, adapter, policy={"reward": Constant()}, max_steps=0)
    assert policy.plan.full_modules == ("model.layers.1.mlp.up_proj",) and policy.plan.lora_modules == ()
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        "model.base_model.model.model.layers.1.mlp.up_proj.modules_to_save.default.weight"
    }
    with pytest.raises(PlanError, match=r"adapter\.plan=.* is not the plan by which the model is adapted .*load the model again"):
        build_trainer(tmp_path, adapter).fit(scored[0], datamodule=build_data(sums))


def test_a_policy_that_is_adapted_already_brings_its_plan_into_the_run_folder(sums, scored, tmp_path):
    build_trainer(tmp_path, build_adapter(0.5), max_steps=1).fit(scored[0], datamodule=build_data(sums))
    assert (tmp_path / "version_0" / "plan.json").read_text() == (scored[1] / "plan.json").read_text()


def test_setup_again_changes_nothing(model, sums, tmp_path):
    policy, data = build_policy(model), build_data(sums, validation_fraction=0.2, test_fraction=0.2)
    trainer = build_trainer(tmp_path, timer := StepTimer(), build_adapter(), max_steps=1)
    assert not list(tmp_path.iterdir()), "a Trainer that runs nothing has no folder"
    trainer.fit(policy, datamodule=data)
    timed = timer.totals()
    plan, weights = policy.plan, {name: p.detach().clone() for name, p in policy.named_parameters()}
    for command in (trainer.validate, trainer.test, trainer.predict):
        command(policy, datamodule=data)
    assert policy.plan is plan
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())
    now = timer.totals()
    assert all(now[name] == timed[name] for name in ("validation", "scoring")), "other commands are not timed"
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(policy, datamodule=data)
    assert timer.totals()["scoring"] < timed["scoring"], "a second fit is timed anew"
    assert policy.plan is plan and weights.keys() == dict(policy.named_parameters()).keys()
    assert list(tmp_path.iterdir()) == [tmp_path / "version_0"] and trainer.log_dir == str(tmp_path / "version_0")


# ---- seeds


class Drawn(Random):
    """Scores by torch's global generator, as a user's scorer may."""

    def score(self, statistics, rank):
        return float(torch.rand(()))


def test_lora_and_scoring_follow_the_modules_seed_without_seed_everything(model, sums, tmp_path, monkeypatch):
    """Whatever a script has drawn before. After `seed_everything`, as on the command line, they follow that seed."""

    def start(drawn_before, seed):
        torch.manual_seed(drawn_before)
        policy = build_policy(model, seed=seed)
        build_trainer(tmp_path, build_adapter(scorer=Drawn()), max_steps=0).fit(policy, datamodule=build_data(sums))
        weights = [weight.detach().flatten() for name, weight in policy.named_parameters() if ".lora_A." in name]
        return [*(module.score for module in policy.plan.candidates), *torch.cat(weights).tolist()]

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert start(1, seed=0) == start(2, seed=0) != start(1, seed=3)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert start(1, seed=0) == start(1, seed=3) != start(2, seed=0)


# ---- refused


def test_impossible_settings_are_refused_before_weights_are_loaded(model):
    for message, options in {
        r"adapter\.calibration_prompts must be at least 1, got 0": {"calibration_prompts": 0},
        r"missing\.json cannot be read": {"plan": "missing.json"},
        "rank_pattern: 'mlp' matches no candidate module": {"rank_pattern": {"mlp": 4}, "target_modules": ["q_proj"]},
        "rank_pattern freezes all modules": {"rank_pattern": {"mlp": 0, "attention": 0}, "share": 0.0},
    }.items():
        with pytest.raises(HybridLightningError, match=message):
            build_adapter(**options).check(build_policy(model))
