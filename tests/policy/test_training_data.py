"""The train dataloader of a run that is resumed."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Log, fit, trained

from hybrid_lightning.policy.optim import CosineSchedule


def test_a_run_of_epochs_goes_on_bit_for_bit(model, sums, tmp_path):
    """Its schedule asks for the number of steps, for which Lightning makes the loader before it could restore its state."""

    def run(ckpt=None):
        log, saver = Log(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        policy = {"schedule": CosineSchedule(), "minibatches_per_rollout": 2}
        callbacks = (log, saver) if ckpt is None else (log,)
        flags = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": ckpt is None}
        return log.losses, trained(fit(model, sums, tmp_path, *callbacks, policy=policy, ckpt=ckpt, **flags))

    losses, whole = run()
    assert len(losses) == 16
    for step in (3, 6, 8):  # within a rollout, at its end, and at the end of an epoch
        rest, resumed = run(tmp_path / f"step={step}.ckpt")
        assert rest == losses[step:] and all(torch.equal(whole[name], resumed[name]) for name in whole)
