"""Supervised and DPO losses and gradients against the code of TRL's own trainers, called with a stand-in for the trainer."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trl_code import Accelerator

from hybrid_lightning.losses import DPOLoss, SupervisedLoss
from hybrid_lightning.types import LossInputs

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

B, T = 6, 5


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    logprobs, reference, entropy = (torch.rand(B, T, generator=generator, dtype=torch.float64) * 3 for _ in range(3))
    mask = torch.arange(T)[None] < lengths[:, None]
    return LossInputs(-logprobs.requires_grad_(), torch.ones(B), mask, ref_logprobs=-reference, entropy=entropy)


def outputs(logprobs, mask, entropy):
    """The outputs of TRL's models: a value for each predicted token, zero where none is learned."""
    filled = {"log_probs": logprobs, "entropy": entropy, "mean_logits": logprobs.detach(), "is_top1": mask}
    return SimpleNamespace(label_mask=mask, **{name: value * mask for name, value in filled.items()})


def trl_dpo(inputs, **arguments):
    """`DPOTrainer._compute_loss` of the same log-probabilities; TRL puts the chosen rows first."""
    order = torch.cat([torch.arange(0, B, 2), torch.arange(1, B, 2)])
    mask = inputs.sampled_mask[order]
    unused = {"ld_alpha": None, "aux_loss_enabled": False, "precompute_ref_logps": False, "use_weighting": False}
    counted = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=lambda **_: outputs(inputs.ref_logprobs[order], mask, inputs.entropy[order]),
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        **unused,
        **counted,
        **arguments,
    )
    trainer.model.is_gradient_checkpointing = False
    completion_mask = torch.cat([torch.zeros(B, 1, dtype=torch.bool), mask], dim=1)  # TRL's begins with the prompt's last token
    batch = {"input_ids": torch.zeros(B, T + 1, dtype=torch.long), "attention_mask": torch.ones(B, T + 1)}
    batch["completion_mask"] = completion_mask
    model = lambda **_: outputs(inputs.logprobs[order], mask, inputs.entropy[order])  # noqa: E731
    loss = DPOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(inputs, ours, theirs):
    """Equal losses with equal gradients."""
    gradients = [torch.autograd.grad(loss, inputs.logprobs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (2.0, 0.0), (0.4, 0.3)])
def test_dpo(beta, smoothing):
    """Label smoothing is TRL's `robust`, ((1 - e) f(m) - e f(-m)) / (1 - 2 e), with the other sign: (1 - e) f(m) + e f(-m)."""
    inputs = make()
    plain, metrics = trl_dpo(inputs, loss_types=["sigmoid"], beta=beta, label_smoothing=0.0)
    robust, _ = trl_dpo(inputs, loss_types=["robust"], beta=beta, label_smoothing=smoothing)
    theirs = 2 * (1 - smoothing) * plain - (1 - 2 * smoothing) * robust
    ours = DPOLoss(beta, smoothing)(inputs)
    assert_same(inputs, ours.loss, theirs)
    assert len(ours.metrics) == 6
    for name, value in ours.metrics.items():
        assert float(value) == pytest.approx(metrics[name], abs=1e-6), name


@pytest.mark.parametrize("num_tokens", [None, 40])
def test_supervised(num_tokens):
    """With and without tokens of other micro-batches in the denominator."""
    inputs = make(2)
    labels = torch.cat([torch.zeros(B, 1), inputs.sampled_mask], dim=1)
    unused = {"aux_loss_enabled": False, "compute_loss_func": None, "label_smoother": None, "get_tp_size": lambda: 1}
    counted = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=True)
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=Accelerator(), args=args, **unused, **counted)
    model = lambda **_: outputs(inputs.logprobs, inputs.sampled_mask, inputs.entropy)  # noqa: E731
    batch = {"labels": labels, "attention_mask": torch.ones(B, T + 1)}
    theirs = SFTTrainer.compute_loss(trainer, model, batch, num_items_in_batch=num_tokens)
    given = replace(inputs, ref_logprobs=None, num_tokens=num_tokens and float(num_tokens))
    ours = SupervisedLoss()(given)
    assert_same(inputs, ours.loss, theirs)
    if num_tokens is None:  # TRL's metrics are of the micro-batch
        assert float(ours.metrics["entropy"]) == pytest.approx(trainer._metrics["train"]["entropy"][-1])
