"""The callback's plan against scores recomputed from full gradients, and what it does at both ends and to other modules."""

import json
from typing import ClassVar

import pytest
import torch
from tiny_models import build_model
from tiny_runs import Constant, build_adapter, build_data, build_policy, build_trainer, write_model, write_sums

from hybrid_lightning.adapters import scorers
from hybrid_lightning.adapters.budgets import ModuleBudget, ParameterBudget
from hybrid_lightning.adapters.gradients import ExactGradients
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.adapters.sketch import SketchedGradients
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.errors import ConfigError, ModelError, PlanError
from hybrid_lightning.rollout.batching import join_rollouts
from hybrid_lightning.trainer import Trainer

pytestmark = pytest.mark.usefixtures("pictures")

IDS = torch.tensor([[4, 5, 13, 6, 16], [9, 8, 7, 6, 5]])
KINDS = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]
NAMES = {f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("setup") / "model")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("setup") / "sums.jsonl", 24)


def set_up(model, sums, root, adapter=None, policy=None, **flags):
    """The policy after the setup of a fit, with nothing trained."""
    module = build_policy(model, **(policy or {}))
    trainer = build_trainer(root, adapter or build_adapter(picture=True), **{"max_steps": 0, **flags})
    trainer.fit(module, datamodule=build_data(sums, validation_fraction=0.2, test_fraction=0.2))
    return module.eval()


def plain_logprobs(model, sequences, row):
    prompt = sequences.prompt_ids[row][sequences.prompt_mask[row]]
    completion = sequences.completion_ids[row][sequences.completion_mask[row]]
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def gradients(model, sums, tmp_path_factory):
    """Full gradients in float64 of the policy objective on the rollouts that the callback scores by."""
    rollouts = []

    class Listening(type(build_policy(model))):
        def generate(self, *args, **kwargs):
            rollouts.append(super().generate(*args, **kwargs))
            return rollouts[-1]

        def _save_arguments(self):
            pass

    policy = build_policy(model)
    policy.__class__ = Listening
    build_trainer(
        tmp_path_factory.mktemp("gradients"),
        build_adapter(calibration_prompts=12, scorer=scorers.PreconditionedTail()),
        max_steps=0,
    ).fit(policy, datamodule=build_data(sums))
    rollout = join_rollouts(rollouts)
    base = build_model("llama", std=0.1).double().requires_grad_(True)
    shares = [sum(c.isdigit() for c in text) / max(1, len(text)) for text in rollout.completions]
    rewards = torch.tensor(shares, dtype=torch.float64).view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    rows = range(len(advantages))
    assert len(rows) == 48
    (-sum(advantages[row] * plain_logprobs(base, rollout.sequences, row).mean() for row in rows) / len(rows)).backward()
    return {name: module.weight.grad for name, module in base.named_modules() if name in NAMES}, policy.plan


def test_the_plan_is_that_of_an_independent_singular_value_decomposition(gradients):
    matrices, plan = gradients
    assert {module.name for module in plan.candidates} == NAMES == set(matrices)

    def tail_of_adams_step(gradient):
        squares = gradient.square()
        second_moment = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
        return float(torch.linalg.svdvals(gradient / second_moment.sqrt())[2:].square().sum())

    expected = {name: tail_of_adams_step(matrix) for name, matrix in matrices.items()}
    for module in plan.candidates:
        assert module.score == pytest.approx(expected[module.name], rel=1e-3)
    best = sorted(expected, key=lambda name: -expected[name])[:3]
    assert set(plan.full_modules) == set(best) and set(plan.lora_modules) == NAMES - set(best)
    assert plan.scorer["class_path"].endswith("PreconditionedTail") and plan.calibration["signal"] == "reward"


@pytest.mark.parametrize(
    "adapter", [{"share": 0.0}, {"share": 0.1}, {"share": 1.0}, {"use_dora": True}, {"use_rslora": True}], ids=str
)
def test_the_start_policy_is_the_base_model_bit_for_bit(model, sums, tmp_path, adapter):
    policy, base = set_up(model, sums, tmp_path, build_adapter(**adapter)), build_model("llama", std=0.1)
    share = adapter.get("share", 0.2)
    assert len(policy.plan.full_modules) == {0.0: 0, 0.1: 1, 0.2: 3, 1.0: 14}[share]
    assert len(policy.plan.full_modules) + len(policy.plan.lora_modules) == 14
    expected = base(IDS).logits
    assert torch.equal(policy.model(IDS).logits, expected)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(policy.model(IDS).logits, expected, atol=0.1)
    with policy.start_policy():
        assert torch.equal(policy.model(IDS).logits, expected)
    assert not torch.allclose(policy.model(IDS).logits, expected, atol=0.1)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_line_need_no_rollouts(model, sums, tmp_path, share):
    policy = set_up(model, sums, tmp_path, build_adapter(share, picture=True), policy={"reward": Constant()})
    assert policy.plan.scorer is None and all(module.score is None for module in policy.plan.candidates)
    assert policy.last_rollout is None and [path.name for path in (tmp_path / "version_0").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("kind", [getattr(scorers, name) for name in scorers.__all__ if name != "Scorer"])
def test_every_scorer_makes_a_plan(model, sums, tmp_path, kind):
    few = {"max_tokens_per_micro_batch": 100}  # several losses, which SpectrumSNR compares
    policy = set_up(model, sums, tmp_path, build_adapter(scorer=kind(), calibration_prompts=12), policy=few)
    plan = AdapterPlan.load(tmp_path / "version_0" / "plan.json")
    assert plan.digest == policy.plan.digest and len(plan.full_modules) == 3
    assert plan.scorer["class_path"].endswith(f".{kind.__name__}")
    best = sorted((module.score for module in plan.candidates), reverse=True)[:4]
    assert len(set(best)) == 4, "no tie decides which modules are trained fully"


class Noted(torch.optim.SGD):
    made: ClassVar[list] = []  # learning rate and number of weights of each that is not the run's own, with LoRA

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        first, *others = self.param_groups
        if not others:
            self.made.append((first["lr"], sum(weight.numel() for weight in first["params"])))


def test_updates_of_the_run_score_the_modules(model, sums, tmp_path, capsys):
    """As many steps as are asked for, by the run's own optimizer, in turns of as many weights as the plan trains at most."""
    Noted.made = made = []
    settings = {"optimizer": Noted, "lr_full": 0.25, "prompts_per_rollout": 4, "minibatches_per_rollout": 2}
    policy = set_up(model, sums, tmp_path, build_adapter(scorer=scorers.UpdateTail(3, 1)), policy=settings)
    plan = policy.plan
    assert (plan.calibration["steps"], plan.calibration["prompts"], plan.calibration["turns"]) == (3, 8, len(made))
    largest = sorted((module.parameters for module in plan.candidates), reverse=True)
    most = sum(largest[:3]) + sum(plan.lora.parameters(module.shape) for module in plan.candidates)
    assert {rate for rate, _ in made} == {0.25}
    assert len(made) > 2 and all(weights <= most for _, weights in made)
    assert sum(weights for _, weights in made) == sum(module.shape[0] * module.shape[1] for module in plan.candidates)
    assert f"Scoring by 3 optimizer steps that are not taken, in {len(made)} turns" in " ".join(capsys.readouterr().out.split())


def test_sketched_gradients_make_the_same_choice(model, sums, tmp_path):
    exact = set_up(model, sums, tmp_path, build_adapter(gradients=ExactGradients())).plan
    sketched = set_up(model, sums, tmp_path, build_adapter(gradients=SketchedGradients())).plan
    assert exact.full_modules == sketched.full_modules


def test_settings_reach_the_plan(model, sums, tmp_path):
    adapter = HybridAdapterSetup(
        budget=ParameterBudget(0.5), rank=3, alpha=5.0, dropout=0.1, target_modules=["q_proj", "down_proj"], calibration_prompts=4
    )
    policy = set_up(model, sums, tmp_path, adapter)
    plan = policy.plan
    assert {module.name.rsplit(".", 1)[1] for module in plan.candidates} == {"q_proj", "down_proj"}
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.dropout) == (3, 5.0, 0.1)
    assert plan.budget == {"class_path": "hybrid_lightning.adapters.ParameterBudget", "init_args": {"share": 0.5}}
    assert (plan.model, plan.revision, plan.seed, plan.calibration["prompts"]) == (str(model), None, 0, 4)


def test_ranks_by_a_pattern_reach_the_plan_and_the_model(model, sums, tmp_path, capsys):
    policy = set_up(model, sums, tmp_path, build_adapter(rank_pattern={"mlp": 3, "attention": 1, "o_proj": 0}))
    plan = AdapterPlan.load(tmp_path / "version_0" / "plan.json")
    assert plan.digest == policy.plan.digest and plan.ranks == (1, 3)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == plan.trainable_parameters()
    frozen = {module.name for module in plan.candidates if module.mode == "frozen"}
    assert frozen == {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)} - set(plan.full_modules)
    assert "LoRA of ranks 1 to 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_pattern": {"mlp": -1}}, "rank_pattern: mlp=-1 must be a whole number"),
        ({"rank_pattern": {"experts": 4}}, "rank_pattern: 'experts' matches no candidate module"),
        ({"rank_pattern": {"mlp": 4}, "target_modules": ["q_proj"]}, "rank_pattern: 'mlp' matches no candidate module"),
        ({"rank_pattern": {"mlp": 0, "attention": 0}, "share": 0.0}, "rank_pattern freezes all modules"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_before_weights_are_loaded(model, options, words):
    with pytest.raises((ConfigError, ModelError), match=words):
        build_adapter(**options).check(build_policy(model))


@pytest.mark.parametrize(("asked", "used"), [(None, 4), (3, 3), (1000, 24)])
def test_as_many_prompts_as_one_rollout_has_are_scored_unless_a_number_is_given(model, sums, tmp_path, asked, used):
    adapter = HybridAdapterSetup(budget=ModuleBudget(0.2), rank=2, calibration_prompts=asked)
    build_trainer(tmp_path, adapter, max_steps=0).fit(policy := build_policy(model), datamodule=build_data(sums))
    assert (policy.plan.calibration["prompts"], policy.plan.calibration["sequences"]) == (used, 4 * used)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_shows_the_plan(model, sums, tmp_path, monkeypatch, rank):
    adapter = build_adapter()
    policy = set_up(model, sums, tmp_path, adapter)
    (tmp_path / "version_0" / "plan.json").unlink()
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: rank == 0))
    adapter.setup(policy.trainer, policy, "fit")
    assert (tmp_path / "version_0" / "plan.json").exists() == (rank == 0)


def test_the_plan_is_written_and_shown(model, sums, tmp_path, capsys):
    policy = set_up(model, sums, tmp_path)
    assert AdapterPlan.load(tmp_path / "version_0" / "plan.json") == policy.plan
    assert (tmp_path / "version_0" / "plan.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "3 fully trained, 11 with LoRA of rank 2" in output and all(name in output for name in policy.plan.full_modules)


def test_the_screen_shows_the_chosen_modules_and_the_next_ten(model, sums, tmp_path, capsys):
    policy = set_up(model, sums, tmp_path)
    output = capsys.readouterr().out
    by_score = [module.name for module in sorted(policy.plan.candidates, key=lambda module: -module.score)]
    full = policy.plan.full_modules
    shown = {*full, *[name for name in by_score if name not in full][:10]}
    assert {name for name in by_score if f" {name} " in output} == shown and 0 < len(by_score) - len(shown) == 1
    assert f"Plan, with 1 more module, written to {tmp_path}" in output.replace("\n", "")
    assert len(AdapterPlan.load(tmp_path / "version_0" / "plan.json").candidates) == len(by_score)


def test_a_plan_file_is_used_without_scoring(model, sums, tmp_path):
    plan = set_up(model, sums, tmp_path / "scored").plan
    content = {**plan.to_dict(), "digest": None}
    for module in content["candidates"]:
        module["mode"] = "full" if module["name"].endswith("layers.1.mlp.up_proj") else "frozen"
    (tmp_path / "mine.json").write_text(json.dumps(content))
    adapter = HybridAdapterSetup(plan=str(tmp_path / "mine.json"))
    policy = set_up(model, sums, tmp_path / "given", adapter, policy={"reward": Constant()})
    assert policy.plan.full_modules == ("model.layers.1.mlp.up_proj",) and policy.plan.lora_modules == ()
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        "model.base_model.model.model.layers.1.mlp.up_proj.modules_to_save.default.weight"
    }


def test_a_plan_of_another_model_is_refused(model, sums, tmp_path):
    set_up(model, sums, tmp_path)
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(PlanError, match=r"the plan was made for model .* but this model has digest"):
        set_up(other, sums, tmp_path, HybridAdapterSetup(plan=str(tmp_path / "version_0" / "plan.json")))


def test_a_plan_beside_an_applied_one_is_refused(model, sums, tmp_path):
    policy = set_up(model, sums, tmp_path / "a")
    set_up(model, sums, tmp_path / "b", build_adapter(0.5))
    trainer = build_trainer(tmp_path, HybridAdapterSetup(plan=str(tmp_path / "b" / "version_0" / "plan.json")))
    with pytest.raises(PlanError, match=r"cannot take adapter\.plan=.* load the model anew"):
        trainer.fit(policy, datamodule=build_data(sums))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HybridAdapterSetup(calibration_prompts=0), r"adapter\.calibration_prompts must be at least 1, got 0"),
        (lambda: HybridAdapterSetup(rank=0), "rank=0"),
        (lambda: HybridAdapterSetup(budget=ModuleBudget(1.5)), r"share=1\.5"),
        (lambda: HybridAdapterSetup(plan="missing.json"), r"missing\.json cannot be read"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises((ConfigError, PlanError), match=message):
        build()


def test_setup_again_changes_nothing(model, sums, tmp_path):
    policy = build_policy(model)
    data = build_data(sums, validation_fraction=0.2, test_fraction=0.2)
    trainer = build_trainer(tmp_path, build_adapter(), max_steps=1)
    trainer.fit(policy, datamodule=data)
    plan, weights = policy.plan, {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.validate(policy, datamodule=data, verbose=False)
    trainer.test(policy, datamodule=data, verbose=False)
    trainer.predict(policy, datamodule=data)
    assert policy.plan is plan
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(policy, datamodule=data)
    assert policy.plan is plan and weights.keys() == dict(policy.named_parameters()).keys()


def test_a_policy_that_is_adapted_already_brings_its_plan_into_the_run_folder(model, sums, tmp_path):
    policy = set_up(model, sums, tmp_path / "a")
    build_trainer(tmp_path / "b", build_adapter(0.5), max_steps=1).fit(policy, datamodule=build_data(sums))
    assert (tmp_path / "b" / "version_0" / "plan.json").read_text() == (tmp_path / "a" / "version_0" / "plan.json").read_text()


def test_evaluation_alone_adapts_nothing(model, sums, tmp_path):
    policy = build_policy(model)
    build_trainer(tmp_path, build_adapter()).validate(policy, datamodule=build_data(sums, validation_fraction=0.2), verbose=False)
    assert policy.plan is None and not list(tmp_path.rglob("plan.json"))
