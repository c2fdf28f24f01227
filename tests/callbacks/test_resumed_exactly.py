"""Stopped anywhere and resumed, a run gives bit for bit the losses of one that was not stopped."""

import contextlib
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stopped_runs import Sent
from tiny_runs import DigitShare, Log, build_adapter, build_data, fit, trained

from hybrid_lightning.callbacks import GracefulStop, RunSummary
from hybrid_lightning.errors import RewardError
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.policy import CosineSchedule
from hybrid_lightning.rollout import sampler

STEPS = 8


def run(model, sums, root, *callbacks, ckpt=None):
    """Step, loss, and how far the sampler's log-probabilities are from training's, of each micro-batch; and the policy."""
    policy = {"loss": GSPOLoss(kl_coef=0.01), "correction": TokenTruncation(cap=3.0), "schedule": CosineSchedule(warmup_steps=2)}
    policy |= {"minibatches_per_rollout": 2, "epochs_per_rollout": 2}
    log, adapter, module = Log(), build_adapter(dropout=0.1, calibration_prompts=8), None
    flags = {"max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "val_check_interval": 8}
    flags |= {"check_val_every_n_epoch": None, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    callbacks = (RunSummary(), adapter, *callbacks, log, GracefulStop())
    data = build_data(sums, validation_fraction=0.2)
    with contextlib.suppress(SystemExit):  # a stopped run ends the program
        module = fit(model, sums, root, *callbacks, policy=policy, data=data, ckpt=ckpt, **flags)
    return [(step["loss"], step["sampling/logp_difference/mean"]) for step in log.metrics], module


@pytest.fixture(scope="module")
def unstopped(model, sums, tmp_path_factory):
    """The losses, the policy, and a folder with checkpoints of all steps."""
    root = tmp_path_factory.mktemp("unstopped")
    losses, policy = run(model, sums, root, ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert len(losses) == 2 * STEPS and all(len(set(values)) > 6 for values in zip(*losses, strict=True))
    return losses, policy, root


def assert_goes_on(model, sums, folder, checkpoint, unstopped):
    """From a checkpoint to the end as the run that was not stopped."""
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    losses, other, _ = unstopped
    rest, policy = run(model, sums, folder, ckpt=checkpoint)
    assert 0 <= step < STEPS and rest == losses[2 * step :]
    weights, expected = trained(policy), trained(other)
    assert weights.keys() == expected.keys() and all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    return step


def test_a_signal_within_completions_leaves_a_checkpoint_that_resumes_exactly(model, sums, tmp_path, unstopped, monkeypatch):
    """At other moments, by the command line: `test_graceful_stop`."""
    with monkeypatch.context() as patch:
        Sent(patch, (sampler._Decoder, "_choose", 33), signal.SIGTERM)
        first, _ = run(model, sums, tmp_path)
    step = assert_goes_on(model, sums, tmp_path, tmp_path / "version_0" / "checkpoints" / "stopped.ckpt", unstopped)
    assert 2 * step <= len(first) < len(unstopped[0]) and first == unstopped[0][: len(first)]


def test_a_reward_that_fails_leaves_a_checkpoint_that_resumes_exactly(model, sums, tmp_path, unstopped, monkeypatch):
    calls = []

    def failing(self, completions, prompts):
        calls.append(len(completions))
        if calls.count(16) > 3:  # two of calibration and the first rollout; validation has others
            raise ValueError("the quota is used up")
        return working(self, completions, prompts)

    working = DigitShare.__call__
    monkeypatch.setattr(DigitShare, "__call__", failing)
    with pytest.raises(RewardError, match=r"the quota is used up \(test_resumed_exactly.py line \d+\)"):
        run(model, sums, tmp_path)
    monkeypatch.undo()
    assert assert_goes_on(model, sums, tmp_path, tmp_path / "version_0" / "checkpoints" / "stopped.ckpt", unstopped) > 0


def test_a_checkpoint_of_any_step_resumes_exactly(model, sums, tmp_path, unstopped):
    """One of the second rollout; of the first one: `test_resume`."""
    assert assert_goes_on(model, sums, tmp_path, unstopped[2] / "step=5.ckpt", unstopped) == 5
