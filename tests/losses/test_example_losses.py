"""Supervised and DPO losses against scalar loops, their gradients, and that no split of a step changes them."""

import math

import pytest
import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import DPOLoss, SupervisedLoss, combine_metrics
from hybrid_lightning.types import LossInputs

B, T = 8, 5
LOSSES = [SupervisedLoss(), DPOLoss(), DPOLoss(beta=0.7, label_smoothing=0.2)]


def make(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    logprobs, reference = (-3 * torch.rand(B, T, generator=generator, dtype=dtype) for _ in range(2))
    entropy = torch.rand(B, T, generator=generator, dtype=dtype)
    mask = (torch.arange(T)[None] < lengths[:, None]) & (torch.rand(B, T, generator=generator) > 0.3)  # with holes
    return LossInputs(logprobs, torch.ones(B), mask, ref_logprobs=reference, entropy=entropy)


def parts(inputs, sizes, **denominators):
    names = ("logprobs", "advantages", "sampled_mask", "ref_logprobs", "entropy")
    for rows in torch.arange(sum(sizes)).split(sizes):
        yield LossInputs(**{name: getattr(inputs, name)[rows] for name in names}, **denominators)


def by_hand(loss, inputs):
    rows = [row[mask].tolist() for row, mask in zip(inputs.logprobs, inputs.sampled_mask, strict=True)]
    if isinstance(loss, SupervisedLoss):
        return -sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    reference = [sum(row[mask].tolist()) for row, mask in zip(inputs.ref_logprobs, inputs.sampled_mask, strict=True)]
    total = 0.0
    for pair in range(B // 2):
        chosen, rejected = (sum(rows[i]) - reference[i] for i in (2 * pair, 2 * pair + 1))
        margin = loss.beta * (chosen - rejected)
        smooth = loss.label_smoothing
        total += (1 - smooth) * math.log(1 + math.exp(-margin)) + smooth * math.log(1 + math.exp(margin))
    return total / (B // 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_equal_a_scalar_loop_and_finite_differences(loss):
    inputs = make(1)
    assert float(loss(inputs).loss) == pytest.approx(by_hand(loss, inputs), rel=1e-12)

    def value(logprobs):
        return loss(LossInputs(logprobs, inputs.advantages, inputs.sampled_mask, ref_logprobs=inputs.ref_logprobs)).loss

    logprobs = torch.where(inputs.sampled_mask, inputs.logprobs, torch.nan).requires_grad_()  # padding may hold anything
    assert torch.equal(value(logprobs), value(inputs.logprobs))
    logprobs = inputs.logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, logprobs)
    (gradient,) = torch.autograd.grad(value(logprobs), logprobs)
    assert not gradient[~inputs.sampled_mask].any() and gradient[inputs.sampled_mask].all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(4, 2, 2), (0, 8)])
def test_shares_add_up_however_a_step_is_split(loss, sizes):
    inputs = make(2)
    whole = loss(inputs)
    denominators = {"num_tokens": float(inputs.sampled_mask.sum()), "num_sequences": float(B)}
    outputs = [loss(part) for part in parts(inputs, sizes, **denominators)]
    assert float(sum(output.loss for output in outputs)) == pytest.approx(float(whole.loss), rel=1e-12)
    joined = combine_metrics(output.metrics for output in outputs)
    assert joined.keys() == whole.metrics.keys() and joined
    for name, value in whole.metrics.items():
        assert float(joined[name]) == pytest.approx(float(value), rel=1e-9), name


def test_a_batch_without_tokens_gives_a_differentiable_zero():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    output = SupervisedLoss()(LossInputs(logprobs, torch.ones(2), torch.zeros(2, 3, dtype=torch.bool)))
    output.loss.backward()
    assert output.loss == 0 and not logprobs.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPOLoss(label_smoothing=0.5), "label_smoothing=0.5 must be at least 0 and below 0.5"),
        (lambda: DPOLoss()(LossInputs(torch.zeros(2, 1), torch.ones(2), torch.ones(2, 1) > 0)), "compares with the start policy"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
