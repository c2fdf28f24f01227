"""Whatever is changed at a resume is applied, said and recorded, or refused with the remedy."""

import functools
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from cli_runs import done, run
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, write_sums

from hybrid_lightning.callbacks import HybridAdapterSetup, RunSummary
from hybrid_lightning.callbacks.resume import SETTINGS_KEY, Change, Resume, changes_of, check_changes
from hybrid_lightning.callbacks.run_settings import flatten_settings
from hybrid_lightning.errors import CheckpointError
from hybrid_lightning.losses import GRPOLoss, GSPOLoss
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.shared.configurable import constructor_defaults, public_path
from hybrid_lightning.training import CosineSchedule, PolicyModule
from hybrid_lightning.training.checkpoint import CHECKPOINT_FORMAT, CHECKPOINT_KEY

# ---- which changes are refused


def test_what_decides_what_is_trained_is_refused():
    names = [*(f"model.{name}" for name in constructor_defaults(PolicyModule)), "model", "data", "adapter", "trainer.max_steps"]
    names += [f"adapter.{name}" for name in constructor_defaults(HybridAdapterSetup)]
    names += [
        "model.optimizer.amsgrad",
        "model.optimizer.weight_decay",
        "model.quantization.double_quant",
        "adapter.budget.share",
    ]
    names += ["seed_everything", "trainer.fast_dev_run", "training prompts", "checkpoint.monitor"]
    refused = []
    for name in names:
        try:
            check_changes([Change(3, name, 1, 7)])
        except CheckpointError:
            refused.append(name)
    of_adapter = {name for name in names if name.startswith("adapter")} - {"adapter.plan", "adapter.keep_start_weights"}
    assert set(refused) == of_adapter | {
        *("model", "model.dtype", "model.quantization", "model.quantization.double_quant", "model.seed", "model.optimizer"),
        *("model.optimizer.amsgrad", "seed_everything", "trainer.fast_dev_run"),
    }


def test_changes_that_would_do_nothing_are_refused():
    for name, after, message in (
        ("model.optimizer.lr", 1, "has no effect, since each group of weights has a rate of its own; give --model.lr_full"),
        ("trainer.max_steps", 2, "trainer.max_steps=2 is less than the 3 steps that the checkpoint has; give how many"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_changes([Change(3, name, None, after)])


def test_the_rate_of_full_modules_moves_with_the_rate_of_lora_unless_it_is_given():
    def settings(rate, given):
        init = {"model": "m", "reward": None, "lr_lora": rate, "lr_full": given}
        return {"seed_everything": 0, "model": {"class_path": public_path(PolicyModule), "init_args": init}}

    groups = [{"name": "full", "lr": 1e-9, "initial_lr": 3e-5}, {"name": "lora", "lr": 1e-9, "initial_lr": 3e-4}]
    for given, moved in ((None, ["model.lr_full 3.0e-05 -> 1.0e-05"]), (1e-3, [])):
        checkpoint = {SETTINGS_KEY: {"settings": settings(3e-4, given)}, "optimizer_states": [{"param_groups": groups}]}
        said = [str(change) for change in changes_of(checkpoint, settings(1e-4, given))]
        assert said == ["model.lr_lora 0.0003 -> 0.0001", *moved]


def test_a_limit_of_one_batch_is_not_one_of_all():
    before, after = ({"seed_everything": 0, "trainer": {"limit_val_batches": limit}} for limit in (1, 1.0))
    (change,) = changes_of({SETTINGS_KEY: {"settings": before}}, after)
    assert str(change) == "trainer.limit_val_batches 1 -> 1.0"


class Best(Callback):
    """A user's callback, which decides itself what of its state stays."""

    def without_measurements(self, state):
        return {**state, "best": None}


@pytest.mark.parametrize(
    ("name", "given_up", "measured"),
    [
        ("model.lr_lora", True, False),
        ("model.reward.bonus", True, True),
        ("model.sampler.temperature", True, True),
        ("model.model", False, False),
        ("model.sampler.urls", False, False),
        ("model.episodes.workers", False, False),
        ("validation prompts", False, True),
        ("trainer.precision", True, False),
        ("trainer.max_steps", False, False),
        ("checkpoint.every_n_train_steps", False, False),
    ],
)
def test_what_a_change_makes_invalid(name, given_up, measured):
    resume, loader, states = Resume(), {"ranks": []}, {"RunSummary": {"before": {"val/avg@2": 0.5}}, "Best": {"best": 1, "n": 2}}
    resume._new = [Change(3, name, 1, 7)]
    checkpoint = {"loops": {"fit_loop": {"state_dict": {"combined_loader": [loader]}}}, "callbacks": states}
    resume.apply(checkpoint, LightningTrainer(logger=False, enable_checkpointing=False, callbacks=[RunSummary(), Best()]))
    assert (loader.get("given_up", False), states["RunSummary"]["before"] == {}) == (given_up, measured)
    assert states["Best"] == {"best": None if measured else 1, "n": 2}


# ---- on the command line


@pytest.fixture(scope="module")
def first(folder):
    """The folder of a run of three steps, in the middle of a rollout and of an epoch."""
    done(folder, "fit", "--config", "t.yaml", "--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2")
    return folder / "runs" / "default" / "version_0"


def go_on(folder, first, *options, command="fit"):
    """The result, and the folder of the new run."""
    before = set((folder / "runs").rglob("config.yaml"))
    checkpoint = first / "checkpoints" / "last.ckpt"
    result = run(folder, command, "--config", first / "config.yaml", "--ckpt_path", checkpoint, *options)
    new = [path.parent for path in (folder / "runs").rglob("config.yaml") if path not in before]
    return result, new[0] if new else None


def test_what_cannot_be_applied_is_refused_before_anything_is_spent(folder, first, monkeypatch):
    monkeypatch.setattr(PolicyModule, "generate", lambda *_, **__: pytest.fail("generated"))
    options = ["--trainer.max_steps=42", "--adapter.budget.share=0.5", "--model.optimizer=torch.optim.SGD", "--seed_everything=1"]
    result, new = go_on(folder, first, *options)
    message = "trained with adapter.budget.share=0.1, but it is 0.5 now, and model.optimizer=AdamW, but it is SGD now, and "
    message += "seed_everything=0, but it is 1 now; give --adapter.budget.share=0.1 --model.optimizer=torch.optim.AdamW "
    message += "--seed_everything=0, or start a new run (without --ckpt_path;"
    assert (result.code, new) == (1, None) and message in result.last, result.err


APPLIED = {
    "model.lr_full": 1e-6,
    "model.lr_lora": 1e-5,
    "model.optimizer.betas": [0.8, 0.9],
    "model.schedule": "hybrid_lightning.training.CosineSchedule",
    "model.loss.kl_coef": 0.02,
    "model.reward.bonus": 0.5,
    "model.eval_samples": 3,
    "data.source.split_seed": 3,
    "adapter.keep_start_weights": True,
    "trainer.max_steps": 5,
    "trainer.accumulate_grad_batches": 4,
    "checkpoint.every_n_train_steps": 1,
    "divergence.window": 10,
}


def test_what_is_applied_is_said_recorded_and_kept_over_resumes(folder, first):
    shutil.copytree(folder / "model", folder / "moved")  # the same model, elsewhere
    applied = {**APPLIED, "model.model": f"{folder}/moved"}
    result, new = go_on(folder, first, *(f"--{name}={value}" for name, value in applied.items()))
    assert result.code == 0, result.err
    changed = {name for name in applied if name != "adapter.keep_start_weights"}  # as it was
    summary = json.loads((new / "summary.json").read_text())
    recorded = {change["name"]: change for change in summary["changes"]}
    assert recorded.keys() - changed == {"training prompts", "validation prompts", "model.schedule.final_factor"}
    assert changed <= recorded.keys()
    assert recorded["model.lr_lora"] == {"step": 3, "name": "model.lr_lora", "before": 0.01, "after": 1e-5}
    assert "changed at this resume: model.lr_lora 0.01 -> 1.0e-05" in result.out
    assert "the change discards the rest of the rollout in progress, and the epoch starts over" in result.out
    assert summary["accuracy_before"] is None, "measured by another reward, on other problems"
    report = json.loads((new / "report.json").read_text())
    assert min(report["curves"]["val/avg@3"][0]) == report["first"]["step"] > 0 and "val/avg@2" not in report["curves"]
    assert report["curves"]["reward"][0][0] == 1
    content = torch.load(new / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["lr_lora"] == 1e-5 and content["hyper_parameters"]["loss"]["init_args"]["kl_coef"] == 0.02
    config = yaml.safe_load((new / "config.yaml").read_text())
    named = flatten_settings(content[SETTINGS_KEY]["settings"])
    for name, value in applied.items():
        place = config
        for key in name.split("."):
            place = place.get("init_args", place)[key]
        assert (place["class_path"] if isinstance(place, dict) else place) == value == named[name], name
    rates = [group["lr"] for group in content["optimizer_states"][0]["param_groups"]]
    assert rates[0] < 1e-6 and rates[1] < 1e-5, "the rates at the end of the schedule"
    result, last = go_on(folder, new, "--trainer.max_steps=6", "--trainer.log_every_n_steps=2")
    assert result.code == 0 and "model.lr_lora" not in result.out, result.err
    *before, steps, every = json.loads((last / "summary.json").read_text())["changes"]
    assert before == summary["changes"] and [steps["name"], every["name"]] == ["trainer.max_steps", "trainer.log_every_n_steps"]


def test_export_takes_other_settings_but_no_adapter_that_contradicts_the_checkpoint(folder, first, tmp_path):
    result, _ = go_on(folder, first, "--adapter.rank=4", command="predict")
    assert result.code == 1 and "trained with adapter.rank=2, but it is 4 now" in result.last
    result, _ = go_on(folder, first, "--model.lr_lora=7", "--folder", tmp_path / "exported", command="export")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert result.code == 0 and "0.01" in card and "7" not in card.partition("lr_lora")[2].partition("\n")[0], "what was trained"


# ---- in Python


class Log(tiny_runs.Log):
    """Also the inputs of every optimizer step's update, and the rows and tokens that it should have had."""

    def __init__(self):
        super().__init__()
        self.steps, self.denominators, self.seen = [], [], [0.0, 0.0]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = [self.seen[0] + len(batch.sequences), self.seen[1] + float(batch.sequences.completion_mask.sum())]
        self.expected = [batch.updated_sequences, batch.updated_tokens]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.denominators.append((self.seen, self.expected))
        self.seen = [0.0, 0.0]
        groups = {}
        for group in optimizer.param_groups:
            states = [{n: v.clone() for n, v in optimizer.state[p].items()} for p in group["params"]]
            pairs = zip(group["params"], states, strict=True)
            groups[group["name"]] = [(p.detach().clone(), p.grad.clone(), state) for p, state in pairs]
        self.steps.append((trainer.global_step, groups))


def saver(root):
    return ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def train(model, sums, root, *callbacks, adapter=None, policy=None, **flags):
    log = Log()
    # The penalty lets every row take part.
    policy = {"minibatches_per_rollout": 2, "loss": GRPOLoss(kl_coef=0.01), **(policy or {})}
    flags = {"max_steps": 6, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **flags}
    module = fit(model, sums, root, adapter or build_adapter(), log, *callbacks, policy=policy, **flags)
    return module, log, module.trainer


@pytest.fixture(scope="module")
def saved(model, sums, tmp_path_factory):
    """Checkpoints of every step of a run. A rollout is two steps, two micro-batches each."""
    root = tmp_path_factory.mktemp("saved")
    module, log, _ = train(model, sums, root, saver(root), accumulate_grad_batches=2)
    return root, log, module


@pytest.fixture
def resumed(model, sums, saved, tmp_path):
    def resume(step, *callbacks, **arguments):
        flags = {"accumulate_grad_batches": 2, **arguments}
        return train(model, sums, tmp_path, *callbacks, ckpt=saved[0] / f"step={step}.ckpt", **flags)

    return resume


def test_the_new_optimizer_updates_with_the_old_moments(resumed):
    make = functools.partial(torch.optim.AdamW, betas=(0.7, 0.8), weight_decay=0.3, eps=1e-3)
    rates, schedule = {"full": 1e-6, "lora": 0.02}, CosineSchedule(warmup_steps=1)
    changed = {"lr_full": rates["full"], "lr_lora": rates["lora"], "optimizer": make, "schedule": schedule}
    _, log, _ = resumed(3, policy=changed)
    assert [step for step, _ in log.steps] == [3, 4, 5]
    for (step, groups), (_, after) in itertools.pairwise(log.steps):
        for name, parameters in groups.items():
            weights = [torch.nn.Parameter(weight) for weight, _, _ in parameters]
            optimizer = make(weights, lr=rates[name] * schedule.factor(step, 6))
            for weight, (_, gradient, state) in zip(weights, parameters, strict=True):
                weight.grad, optimizer.state[weight] = gradient, state
                assert float(state["step"]) == step, "moments and counters continue"
            optimizer.step()
            assert all(torch.equal(weight, expected) for weight, (expected, *_) in zip(weights, after[name], strict=True))


def test_fused_steps_take_new_rates(resumed):
    changed = {"lr_lora": 0.5, "optimizer": functools.partial(torch.optim.AdamW, betas=(0.5, 0.6), fused=True)}
    groups = resumed(2, policy=changed, max_steps=3)[2].optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [1e-3, 0.5] and {group["betas"] for group in groups} == {(0.5, 0.6)}
    assert all(group["fused"] for group in groups)


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (1, {"accumulate_grad_batches": 1}),
        (3, {"accumulate_grad_batches": 4}),
        (6, {"limit_train_batches": 3}),
        (1, {"policy": {"minibatches_per_rollout": 1}}),
        (6, {"rows": 8}),
    ],
    ids=str,
)
def test_every_later_step_is_of_whole_minibatches(resumed, tmp_path, step, changed):
    """Other numbers of micro-batches, within a rollout (odd steps) and at the end of one."""
    data = build_data(write_sums(tmp_path / "sums.jsonl", changed.get("rows", 24)))
    flags = {name: value for name, value in changed.items() if name != "rows"}
    _, log, trainer = resumed(step, data=data, max_steps=step + 3, **flags)
    assert trainer.global_step == step + 3
    cut = "limit_train_batches" in changed  # an epoch that ends within a step makes the step with the batches it has
    assert [seen == expected for seen, expected in log.denominators] == [not cut or n % 2 == 0 for n in range(3)]


def test_an_unchanged_resume_keeps_the_rollout_and_a_changed_loss_gives_it_up(saved, resumed):
    _, log, _ = saved
    assert resumed(1, max_steps=7)[1].losses[: len(log.losses) - 2] == log.losses[2:], "a longer run keeps it as well"
    _, other, trainer = resumed(1, policy={"loss": GSPOLoss(kl_coef=0.0)}, max_steps=3)
    assert trainer.global_step == 3
    assert other.batches[0].old_logprobs is None, "a new rollout: its first step is on-policy"
    assert all(batch.ref_logprobs is None for batch in other.batches)


def test_a_penalty_that_needs_start_weights_can_be_switched_on_together_with_them(model, sums, tmp_path):
    without = build_adapter(keep_start_weights=False)
    train(model, sums, tmp_path, saver(tmp_path), adapter=without, policy={"loss": GRPOLoss()}, max_steps=1)
    _, log, trainer = train(model, sums, tmp_path, ckpt=tmp_path / "step=1.ckpt", max_steps=3)
    assert float(trainer.callback_metrics["kl"]) > 0 and log.batches[0].ref_logprobs is not None


def test_settings_of_callbacks_are_not_taken_from_the_checkpoint(model, sums, tmp_path):
    def callbacks(patience):
        best = ModelCheckpoint(tmp_path / "best", monitor="val/avg@2", mode="max", save_top_k=1, filename="{step}")
        return [RunSummary(), EarlyStopping("val/avg@2", patience=patience, mode="max", strict=False), best, saver(tmp_path)]

    flags = {"check_val_every_n_epoch": None, "val_check_interval": 1, "policy": {"prompts_per_rollout": 2}}
    few, more = (build_data(sums, validation_fraction=fraction) for fraction in (0.2, 0.4))
    train(model, sums, tmp_path, *callbacks(50), data=few, max_steps=2, **flags)
    summary, stopping, best, _ = changed = callbacks(70)
    train(model, sums, tmp_path, *changed, ckpt=tmp_path / "step=2.ckpt", data=more, max_steps=3, **flags)
    assert stopping.patience == 70
    assert Path(best.best_model_path).name == "step=3.ckpt", "the best on other problems does not count"
    assert summary._before == {}


def test_a_checkpoint_of_another_program_or_format_is_refused(model, sums, saved, tmp_path):
    content = torch.load(saved[0] / "step=3.ckpt", weights_only=True)
    other = {**content.pop(CHECKPOINT_KEY), "format": CHECKPOINT_FORMAT + 1}
    refusal = f"has format {CHECKPOINT_FORMAT + 1}, but this version reads format {CHECKPOINT_FORMAT}; resume with"
    data = {"datamodule": build_data(sums, validation_fraction=0.2), "ckpt_path": tmp_path / "other.ckpt"}
    for entry, message, command in (
        ({}, "was not written by hybrid_lightning", "validate"),
        ({CHECKPOINT_KEY: other}, refusal, "fit"),
    ):
        torch.save({**content, **entry}, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=message):
            getattr(build_trainer(tmp_path, build_adapter()), command)(build_policy(model), **data)


def test_settings_made_in_python_are_compared_by_lightnings_own_trainer_too(resumed):
    message = r"but it is \{mlp: 3\} now, .* give --adapter\.budget\.share=0\.2 --adapter\.rank_pattern=null --model\.seed=0, or"
    with pytest.raises(CheckpointError, match=message):
        resumed(3, adapter=build_adapter(share=0.5, rank_pattern={"mlp": 3}), policy={"seed": 1})
    with pytest.raises(CheckpointError, match=r"model\.optimizer=AdamW, but it is SGD now"):
        resumed(3, kind=LightningTrainer, policy={"optimizer": torch.optim.SGD})
    resumed(3, kind=LightningTrainer, adapter=(adapter := build_adapter()), policy={"lr_lora": 1e-4}, max_steps=4)
    changes = [str(change) for change in adapter.resume.changes if change.name.startswith("model")]
    assert changes == ["model.lr_lora 0.01 -> 0.0001"]


def test_a_part_is_told_alike_however_it_was_made(resumed):
    """Arguments that are left out equal the constructor's defaults, and numbers are equal in any type."""
    adapter = build_adapter(gradients=None, rank=2, alpha=32, use_dora=False)
    sampler, optimizer = Sampler(max_new_tokens=6, temperature=1), functools.partial(torch.optim.AdamW)
    resumed(3, adapter=adapter, policy={"sampler": sampler, "advantage": None, "optimizer": optimizer})
    assert adapter.resume.changes == []


def test_a_run_of_a_plan_resumes_by_that_plan_alone(saved, resumed, tmp_path):
    _, whole, module = saved
    module.plan.save(tmp_path / "plan.json")
    _, log, _ = resumed(3, adapter=HybridAdapterSetup(plan=str(tmp_path / "plan.json")))
    assert log.losses == whole.losses[6:]
    first, *others = module.plan.candidates
    replace(module.plan, candidates=(replace(first, mode="frozen"), *others)).save(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="not the plan of the checkpoint"):
        resumed(3, adapter=HybridAdapterSetup(plan=str(tmp_path / "other.json")))
