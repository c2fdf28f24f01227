"""The train dataloader of a run that is resumed."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, trained

from hybrid_lightning.policy.optim import CosineSchedule


def test_a_run_of_epochs_goes_on_bit_for_bit(model, sums, tmp_path):
    """Its schedule asks for the number of steps, for which Lightning makes the loader before it could restore its state."""

    def run(root, ckpt_path=None):
        torch.manual_seed(11)
        policy = build_policy(model, schedule=CosineSchedule(), minibatches_per_rollout=2)
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = build_trainer(root, build_adapter(), saver, max_steps=-1, max_epochs=2, enable_checkpointing=True)
        trainer.fit(policy, datamodule=build_data(sums), ckpt_path=ckpt_path)
        return trained(policy)

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=3.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
