"""Stopped anywhere and resumed, a run gives bit for bit the losses of one that was not stopped."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import build_model, build_tokenizer

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import GracefulStop, HybridAdapterSetup, RunSummary
from hybrid_lightning.data import FileSource, PlainFormat, PromptDataModule
from hybrid_lightning.errors import CheckpointError, PlanError, RewardError
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.policy.optim import CosineSchedule
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.trainer import Trainer

STEPS = 12


class DigitShare(RewardFunction):
    """Share of digits in the completion: an untrained policy earns a bit of it, so that there is a gradient at once."""

    def __call__(self, completions, prompts):
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    build_model("llama", std=0.1).save_pretrained(folder / "model")
    build_model("llama", seed=1, std=0.1).save_pretrained(folder / "other")
    for name in ("model", "other"):
        build_tokenizer().save_pretrained(folder / name)
    rows = (f'{{"question": "{a}+{b}=", "answer": "{a + b}"}}' for a in range(6) for b in range(4))
    (folder / "sums.jsonl").write_text("\n".join(rows))
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


def run(folder, root, *, ckpt=None, callbacks=(), model="model", adapter=None, dropout=0.1, **flags):
    torch.manual_seed(11)
    policy = PolicyModule(
        loss=GSPOLoss(kl_coef=0.01),
        reward=DigitShare(),
        model=str(folder / model),
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
    data = PromptDataModule(FileSource(str(folder / "sums.jsonl"), validation_fraction=0.2), PlainFormat())
    log = LossLog()
    adapter = adapter or HybridAdapterSetup(budget=ModuleBudget(0.2), rank=2, dropout=dropout, calibration_prompts=8)
    trainer = Trainer(
        **{
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "accelerator": "cpu",
            "default_root_dir": root,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "callbacks": [RunSummary(), adapter, *callbacks, log, GracefulStop()],
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "val_check_interval": 8,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            **flags,
        }
    )
    with contextlib.suppress(SystemExit):  # a stopped run ends the program
        trainer.fit(policy, datamodule=data, ckpt_path=ckpt)
    return log.losses, policy


@pytest.fixture(scope="module")
def unstopped(folder):
    losses, policy = run(folder, folder / "unstopped")
    assert losses[-1][0] == STEPS and len({loss for _, (loss, _) in losses}) > 6
    assert len({difference for _, (_, difference) in losses}) > 6
    return losses, {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def assert_same(parts, unstopped, policy):
    assert parts == unstopped[0]
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, unstopped[1][name]), name


MOMENTS = [{"batch": 1}, {"batch": 4}, {"batch": 7}, {"batch": 8}, {"batch": 16}, {"batch": 17}, {"token": 2}, {"token": 9}]


@pytest.mark.parametrize(
    ("number", "when"),
    [*((signal.SIGINT, when) for when in MOMENTS), (signal.SIGTERM, {"batch": 7}), (signal.SIGTERM, {"token": 9})],
    ids=str,
)
def test_a_signal_leaves_a_checkpoint_that_resumes_exactly(folder, tmp_path, unstopped, number, when):
    first, _ = run(folder, tmp_path, callbacks=[SignalAt(number, **when)])
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
    with pytest.raises(RewardError, match=r"the quota is used up \(test_resume.py line \d+\)"):
        run(folder, tmp_path)
    monkeypatch.undo()
    checkpoint = tmp_path / "version_0" / "checkpoints" / "stopped.ckpt"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    rest, policy = run(folder, tmp_path, ckpt=checkpoint)
    assert step > 0
    assert_same(unstopped[0][: 2 * step] + rest, unstopped, policy)


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_checkpoint_of_any_step_resumes_exactly(folder, tmp_path, unstopped, every):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    run(folder, tmp_path, callbacks=[saver])
    rest, policy = run(folder, tmp_path, ckpt=tmp_path / f"step={every}.ckpt")
    assert rest[0][0] == every or rest[0][0] == every + 1
    assert_same(unstopped[0][: 2 * every] + rest, unstopped, policy)


def test_a_checkpoint_holds_trainable_weights_only_and_loads_alone(folder, tmp_path, unstopped):
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=STEPS)
    _, policy = run(folder, tmp_path, callbacks=[saver])
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == trainable
    loaded = PolicyModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.plan.digest == policy.plan.digest and isinstance(loaded.reward, DigitShare)
    assert loaded.loss.kl_coef == 0.01 and loaded.schedule.warmup_steps == 2
    assert isinstance(loaded.correction, TokenTruncation) and loaded.correction.cap == 3
    ids = torch.tensor([[4, 5, 13, 6, 16]])
    policy.eval(), loaded.eval()
    assert torch.equal(policy.model(ids).logits, loaded.model(ids).logits)
    with policy.start_policy():
        assert torch.equal(policy.model(ids).logits, build_model("llama", std=0.1)(ids).logits)


def stopped(folder, tmp_path):
    run(folder, tmp_path, callbacks=[SignalAt(signal.SIGINT, batch=4)])
    return tmp_path / "version_0" / "checkpoints" / "stopped.ckpt"


def test_another_model_than_the_checkpoints_is_refused(folder, tmp_path):
    with pytest.raises((CheckpointError, PlanError), match="digest"):
        run(folder, tmp_path, ckpt=stopped(folder, tmp_path), model="other")


def test_another_plan_than_the_checkpoints_is_refused(folder, tmp_path):
    checkpoint = stopped(folder, tmp_path)
    _, policy = run(folder, tmp_path / "b", max_steps=1, adapter=HybridAdapterSetup(budget=ModuleBudget(0.5), rank=2))
    policy.plan.save(tmp_path / "other.json")
    adapter = HybridAdapterSetup(plan=str(tmp_path / "other.json"))
    with pytest.raises(CheckpointError, match="not the plan of the checkpoint"):
        run(folder, tmp_path, ckpt=checkpoint, adapter=adapter)


def test_a_foreign_checkpoint_is_refused(folder, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not written by hybrid_lightning"):
        run(folder, tmp_path, ckpt=Path(tmp_path / "foreign.ckpt"))
