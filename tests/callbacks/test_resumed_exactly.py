"""Stopped anywhere and resumed, a run gives bit for bit the losses of one that was not stopped."""

import contextlib
import os
import signal
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import build_model
from tiny_runs import DigitShare, build_data, build_trainer, write_model, write_sums

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import GracefulStop, HybridAdapterSetup, RunSummary
from hybrid_lightning.errors import CheckpointError, RewardError
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.policy.optim import CosineSchedule
from hybrid_lightning.rollout.sampler import Sampler

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


class LossLog(Callback):
    """Step, loss, and how far the sampler's log-probabilities are from those of training."""

    def __init__(self):
        self.losses: list[tuple[int, tuple[float, float]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = (float(trainer.callback_metrics[name]) for name in ("loss", "sampling/logp_difference/mean"))
        self.losses.append((trainer.global_step, tuple(values)))


class SignalAt(Callback):
    """Sends a signal at a moment: after a micro-batch, or while the n-th rollout is generated."""

    def __init__(self, number, batch=None, token=None):
        self.number, self.batch, self.token, self.count, self.tokens = number, batch, token, 0, 0

    def on_train_start(self, trainer, pl_module):
        pl_module.generation_listeners.append(self.listen)

    def listen(self, running, decoded, total):
        self.tokens += 1
        if self.tokens == self.token:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            os.kill(os.getpid(), self.number)


def run(folder, root, *callbacks, ckpt=None, adapter=None):
    torch.manual_seed(11)
    policy = PolicyModule(
        loss=GSPOLoss(kl_coef=0.01),
        reward=DigitShare(),
        model=str(folder / "model"),
        sampler=Sampler(max_new_tokens=6),
        correction=TokenTruncation(cap=3.0),
        prompts_per_rollout=4,
        samples_per_prompt=4,
        minibatches_per_rollout=2,
        epochs_per_rollout=2,
        eval_samples=2,
        lr_full=1e-3,
        lr_lora=1e-2,
        schedule=CosineSchedule(warmup_steps=2),
    )
    log = LossLog()
    adapter = adapter or HybridAdapterSetup(budget=ModuleBudget(0.2), rank=2, dropout=0.1, calibration_prompts=8)
    trainer = build_trainer(
        root,
        *(RunSummary(), adapter, *callbacks, log, GracefulStop()),
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        val_check_interval=8,
        check_val_every_n_epoch=None,
    )
    with contextlib.suppress(SystemExit):  # a stopped run ends the program
        trainer.fit(policy, datamodule=build_data(folder / "sums.jsonl", validation_fraction=0.2), ckpt_path=ckpt)
    return log.losses, policy


@pytest.fixture(scope="module")
def unstopped(folder):
    """The losses, and the policy; checkpoints of all steps are in the folder `unstopped`."""
    root = folder / "unstopped"
    losses, policy = run(folder, root, ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert losses[-1][0] == STEPS and len({loss for _, (loss, _) in losses}) > 6
    assert len({difference for _, (_, difference) in losses}) > 6
    return losses, policy


def assert_same(parts, unstopped, policy):
    losses, other = unstopped
    assert parts == losses
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, {"batch": 1}),
        (signal.SIGTERM, {"batch": 4}),  # the end of a step
        (signal.SIGINT, {"batch": 7}),  # within a step
        (signal.SIGINT, {"batch": 8}),  # the end of a rollout
        (signal.SIGTERM, {"batch": 17}),  # the beginning of one
        (signal.SIGINT, {"token": 2}),
        (signal.SIGTERM, {"token": 9}),
    ],
    ids=str,
)
def test_a_signal_leaves_a_checkpoint_that_resumes_exactly(folder, tmp_path, unstopped, number, when):
    first, _ = run(folder, tmp_path, SignalAt(number, **when))
    checkpoint = tmp_path / "version_0" / "checkpoints" / "stopped.ckpt"
    assert checkpoint.is_file() and len(first) < len(unstopped[0])
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    rest, policy = run(folder, tmp_path, ckpt=checkpoint)
    assert_same(first[: 2 * step] + rest, unstopped, policy)  # of a step that was not finished one micro-batch may have been made


def test_a_reward_that_fails_leaves_a_checkpoint_that_resumes_exactly(folder, tmp_path, unstopped, monkeypatch):
    calls = []

    def failing(self, completions, prompts):
        calls.append(len(completions))
        if calls.count(16) > 3:  # two of calibration and the first rollout; validation has others
            raise ValueError("the quota is used up")
        return working(self, completions, prompts)

    working = DigitShare.__call__
    monkeypatch.setattr(DigitShare, "__call__", failing)
    with pytest.raises(RewardError, match=r"the quota is used up \(test_resumed_exactly.py line \d+\)"):
        run(folder, tmp_path)
    monkeypatch.undo()
    checkpoint = tmp_path / "version_0" / "checkpoints" / "stopped.ckpt"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    rest, policy = run(folder, tmp_path, ckpt=checkpoint)
    assert step > 0
    assert_same(unstopped[0][: 2 * step] + rest, unstopped, policy)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_checkpoint_of_any_step_resumes_exactly(folder, tmp_path, unstopped, step):
    rest, policy = run(folder, tmp_path, ckpt=folder / "unstopped" / f"step={step}.ckpt")
    assert rest[0][0] in (step, step + 1)
    assert_same(unstopped[0][: 2 * step] + rest, unstopped, policy)


def test_a_checkpoint_holds_trainable_weights_only_and_loads_alone(folder, unstopped):
    _, policy = unstopped
    path = folder / "unstopped" / f"step={STEPS}.ckpt"
    content = torch.load(path, weights_only=True)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == trainable
    loaded = PolicyModule.load_from_checkpoint(path)
    assert loaded.plan.digest == policy.plan.digest and isinstance(loaded.reward, DigitShare)
    assert loaded.loss.kl_coef == 0.01 and loaded.schedule.warmup_steps == 2
    assert isinstance(loaded.correction, TokenTruncation) and loaded.correction.cap == 3
    ids = torch.tensor([[4, 5, 13, 6, 16]])
    policy.eval(), loaded.eval()
    assert torch.equal(policy.model(ids).logits, loaded.model(ids).logits)
    with policy.start_policy():
        assert torch.equal(policy.model(ids).logits, build_model("llama", std=0.1)(ids).logits)


def test_another_plan_than_the_checkpoints_is_refused(folder, tmp_path, unstopped):
    plan = unstopped[1].plan
    first, *others = plan.candidates
    other = replace(plan, candidates=(replace(first, mode="frozen"), *others))
    other.save(tmp_path / "other.json")
    adapter = HybridAdapterSetup(plan=str(tmp_path / "other.json"))
    with pytest.raises(CheckpointError, match="not the plan of the checkpoint"):
        run(folder, tmp_path, ckpt=folder / "unstopped" / "step=3.ckpt", adapter=adapter)
