"""The train dataloader: the Trainer's flags keep Lightning's meaning with a policy, and epochs continue at a resume."""

import pytest
import tiny_runs
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from tiny_runs import build_data, fit, trained

from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.training.optim import CosineSchedule


class Log(tiny_runs.Log):
    """And what happened at every micro-batch and validation."""

    def __init__(self):
        super().__init__()
        # Epoch -> micro-batch -> prompts of its rollout; steps after each micro-batch; micro-batches before each validation.
        self.epochs, self.steps, self.validations = [], [], []
        # Of each optimizer step: sequences and tokens with gradients in it, and the ones that it counts.
        self.denominators, self.seen, self.expected = [], [0.0, 0.0], [0.0, 0.0]

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs[-1].append([prompt.text for prompt in batch.rollout.prompts])
        self.seen = [self.seen[0] + len(batch.sequences), self.seen[1] + float(batch.sequences.completion_mask.sum())]
        self.expected = [batch.updated_sequences, batch.updated_tokens]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.denominators.append((self.seen, self.expected))
        self.seen = [0.0, 0.0]

    def on_train_batch_end(self, trainer, *arguments):
        super().on_train_batch_end(trainer, *arguments)
        self.steps.append(trainer.global_step)

    def on_validation_start(self, trainer, pl_module):
        self.validations.append(len(self.steps))


def run(model, sums, root, *callbacks, policy=None, validation=0.0, **flags):
    log, data = Log(), build_data(sums, validation_fraction=validation)
    fit(model, sums, root, log, *callbacks, policy=policy, data=data, **{"max_steps": -1, **flags})
    return log


@pytest.mark.parametrize(
    ("sizes", "accumulate", "steps"),
    [
        ({"prompts_per_rollout": 8, "minibatches_per_rollout": 2, "epochs_per_rollout": 2}, 2, 8),
        ({"prompts_per_rollout": 5, "samples_per_prompt": 2}, 2, 3),
    ],
)
def test_an_epoch_has_a_step_for_each_minibatch_of_each_pass(model, sums, tmp_path, sizes, accumulate, steps):
    policy = {**sizes, "loss": GRPOLoss(kl_coef=0.01)}  # with which every row takes part
    log = run(model, sums, tmp_path, policy=policy, max_epochs=1, accumulate_grad_batches=accumulate)
    assert log.steps[-1] == steps and len(log.steps) == steps * accumulate
    assert all(seen == expected for seen, expected in log.denominators)
    prompts = {text for batch in log.epochs[0] for text in batch}
    assert len(prompts) == 16 // sizes.get("prompts_per_rollout", 4) * sizes.get("prompts_per_rollout", 4)


def test_max_epochs_and_max_steps_and_limits_and_accumulation_that_changes_between_epochs(model, sums, tmp_path):
    log = run(model, sums, tmp_path, max_epochs=2, limit_train_batches=0.5)
    assert [len(epoch) for epoch in log.epochs] == [2, 2]
    log = run(model, sums, tmp_path, max_steps=5, accumulate_grad_batches=2)
    assert log.steps[-1] == 5 and [len(epoch) for epoch in log.epochs] == [8, 2]
    log = run(model, sums, tmp_path, GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)
    assert log.steps == [1, 2, 3, 4, 4, 5, 5, 6] and log.epochs[0] != log.epochs[1][::2]
    assert all(seen == expected for seen, expected in log.denominators)


def test_epochs_cut_within_a_step_do_not_mix_steps(model, sums, tmp_path):
    """Lightning makes a cut epoch's last step with the batches it has; its rest must not leak into the next one."""
    policy = {"loss": GRPOLoss(kl_coef=0.01)}  # with which every row takes part
    log = run(model, sums, tmp_path, policy=policy, max_epochs=3, limit_train_batches=6, accumulate_grad_batches=4)
    assert [len(epoch) for epoch in log.epochs] == [6, 6, 6] and log.steps[-1] == 6
    whole, cut = log.denominators[::2], log.denominators[1::2]
    assert all(seen == expected for seen, expected in whole)
    assert [(seen[0], expected[0]) for seen, expected in cut] == [(8, 16)] * 3
    first, last = [log.metrics[i::6] for i in (0, 3)]
    assert all(step["ratio/mean"] < 0.5 for step in first) and all(step["ratio/mean"] > 0.9 for step in last)


def test_overfit_batches_repeats_its_prompts(model, sums, tmp_path):
    log = run(model, sums, tmp_path, max_epochs=3, overfit_batches=2)
    assert [len(epoch) for epoch in log.epochs] == [2, 2, 2]
    assert log.epochs[0] == log.epochs[1] == log.epochs[2]


def test_validation_comes_when_asked_for_and_does_not_change_training(model, sums, tmp_path):
    often = run(model, sums, tmp_path, validation=0.25, max_steps=6, val_check_interval=2, check_val_every_n_epoch=None)
    once = run(model, sums, tmp_path, validation=0.25, max_epochs=2, check_val_every_n_epoch=2)
    assert often.validations == [2, 4, 6] and once.validations == [6]
    assert [step["loss"] for step in often.metrics] == [step["loss"] for step in once.metrics]


def test_a_run_of_epochs_resumes_bit_for_bit(model, sums, tmp_path):
    """Its schedule asks for the number of steps, for which Lightning makes the loader before it could restore its state."""

    def losses_and_weights(ckpt=None):
        log, saver = tiny_runs.Log(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        policy = {"schedule": CosineSchedule(), "prompts_per_rollout": 8, "minibatches_per_rollout": 2}
        callbacks = (log, saver) if ckpt is None else (log,)
        flags = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": ckpt is None}
        return log.losses, trained(fit(model, sums, tmp_path, *callbacks, policy=policy, ckpt=ckpt, **flags))

    losses, whole = losses_and_weights()
    assert len(losses) == 8
    for step in (1, 4):  # within a rollout, and at the end of an epoch
        rest, resumed = losses_and_weights(tmp_path / f"step={step}.ckpt")
        assert rest == losses[step:] and all(torch.equal(whole[name], resumed[name]) for name in whole)
