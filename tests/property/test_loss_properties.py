"""What must hold of the losses for any inputs. The ratio classes refuse each other's clip range; 0.02 / 0.03 suits both."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_lightning import losses
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs, LossOutput

OPTIONS = [{}, {"dual_clip": 1.2}, {"kl_coef": 0.2}, {"kl_coef": 0.2, "kl_importance_weight": True}]
LOSSES = [cls(0.02, 0.03, **options) for cls in (losses.GRPOLoss, losses.GSPOLoss) for options in OPTIONS]
LOSSES += [
    losses.GSPOTokenLoss(0.02, 0.03, kl_coef=0.2),
    losses.DAPOLoss(0.02, 0.03, dual_clip=1.2),
    losses.DrGRPOLoss(0.02, 0.03, kl_coef=0.2, kl_importance_weight=True),
    losses.BNPOLoss(0.02, 0.03, entropy_coef=0.1),
    losses.CISPOLoss(cap=1.1, kl_coef=0.2),
    losses.SAPOLoss(entropy_coef=0.1, off_policy_mask_threshold=0.1),
    losses.DPPOLoss(0.1, 0.1, kl_coef=0.2),
]
IDS = [f"{type(loss).__name__}-{i}" for i, loss in enumerate(LOSSES)]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=IDS)
few = settings(max_examples=15, deadline=None)


@st.composite
def loss_inputs(draw, max_tokens: int = 6, min_tokens: int = 0, by_token: bool = False) -> LossInputs:
    b, t = draw(st.integers(1, 6)), draw(st.integers(1, max_tokens))
    lengths = draw(st.lists(st.integers(min_tokens, t), min_size=b, max_size=b))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1e-3, 0.03, 0.5, 3.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -2 * normal(b, t).abs()
    sampled = torch.arange(t)[None] < torch.tensor(lengths)[:, None]
    if draw(st.booleans()):  # with holes, where an environment added tokens
        sampled &= torch.rand(b, t, generator=generator) > 0.5
        sampled[:, 0] |= min_tokens > 0
    advantages = normal(b) * (torch.rand(b, generator=generator) > 0.2)
    if by_token and draw(st.booleans()):
        advantages = advantages[:, None] * normal(b, t)
    return LossInputs(
        logprobs=logprobs,
        advantages=advantages,
        sampled_mask=sampled,
        old_logprobs=logprobs + spread * normal(b, t) if draw(st.booleans()) else None,
        ref_logprobs=logprobs + spread * normal(b, t),
        importance_weights=0.1 + normal(b, t).abs() if draw(st.booleans()) else None,
        entropy=normal(b, t).abs(),
        max_completion_tokens=10.0,
    )


def evaluate(loss, inputs: LossInputs) -> tuple[LossOutput, Tensor]:
    """The output, and the gradient with respect to the log-probabilities, on which the entropy depends too."""
    logprobs = inputs.logprobs.detach().requires_grad_()
    inputs = replace(inputs, logprobs=logprobs, entropy=inputs.entropy - 0.3 * logprobs)
    output = loss(inputs)
    return output, torch.autograd.grad(output.loss, inputs.logprobs)[0]


def change(inputs: LossInputs, function) -> LossInputs:
    """Apply `function(name, tensor)` to every tensor."""
    present = {entry.name: getattr(inputs, entry.name) for entry in fields(inputs)}
    return replace(inputs, **{k: function(k, v) for k, v in present.items() if isinstance(v, Tensor)})


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@each_loss
@few
@given(inputs=loss_inputs(), data=st.data())
def test_neither_what_was_not_sampled_nor_holes_nor_the_order_of_sequences_changes_anything(loss, inputs, data):
    """Tokens that were not sampled are padding, or were added within a completion."""
    extra, garbage = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([99.0, *map(float, ("nan", "inf", "-inf"))]))
    rows = torch.tensor(data.draw(st.permutations(range(len(inputs.advantages)))))
    together = (~inputs.sampled_mask).long().argsort(dim=1, stable=True)  # sampled tokens first

    def pad(name: str, value: Tensor) -> Tensor:
        if name == "advantages":
            return value
        if value.is_floating_point():
            value = torch.where(inputs.sampled_mask, value, garbage)
        more = torch.full((len(value), extra), garbage if value.is_floating_point() else 0).to(value.dtype)
        return torch.cat([value, more], dim=1)

    plain, gradient = evaluate(loss, inputs)
    for changed, expected in (
        (change(inputs, pad), torch.nn.functional.pad(gradient, (0, extra))),
        (
            change(inputs, lambda name, value: value if value.dim() == 1 else value.gather(1, together)),
            gradient.gather(1, together),
        ),
        (change(inputs, lambda _, value: value[rows]), gradient[rows]),
    ):
        output, found = evaluate(loss, changed)
        assert close(output.loss, plain.loss) and close(found, expected)
        assert all(close(value, output.metrics[name]) for name, value in plain.metrics.items())


@each_loss
@few
@given(data=st.data())
def test_splitting_into_micro_batches_does_not_matter(loss, data):
    inputs = data.draw(loss_inputs(by_token=loss.takes_token_advantages))
    b = len(inputs.advantages)
    cuts = sorted(data.draw(st.sets(st.integers(1, b - 1)))) if b > 1 else []
    tokens = float(inputs.sampled_mask.sum())
    counts = {"num_sequences": float(b), "num_tokens": tokens, "micro_batch_tokens": tokens, "num_micro_batches": 1.0}
    whole, gradient = evaluate(loss, inputs)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, b], strict=True):
        rows = change(replace(inputs, **counts), lambda _, value, s=start, e=end: value[s:e])
        places = rows.sampled_mask.any(dim=0).nonzero()
        width = int(places.max()) + 1 if len(places) else 1  # each micro-batch is cut to its own longest completion
        parts.append(evaluate(loss, change(rows, lambda _, v, w=width: v if v.dim() == 1 else v[:, :w])))
    assert close(sum(output.loss for output, _ in parts), whole.loss)
    widened = [torch.nn.functional.pad(g, (0, gradient.shape[1] - g.shape[1])) for _, g in parts]
    assert close(torch.cat(widened), gradient)
    joined = losses.combine_metrics(output.metrics for output, _ in parts)
    assert all(close(joined[name], value) for name, value in whole.metrics.items()) and joined.keys() == whole.metrics.keys()


@each_loss
@few
@given(
    inputs=loss_inputs(),
    correction=st.sampled_from([losses.TokenTruncation, losses.TokenMask, losses.SequenceTruncation, losses.SequenceMask]),
)
def test_a_correction_changes_nothing_where_sampler_and_policy_agree(loss, inputs, correction):
    weights = F.per_token(correction()(inputs.logprobs, inputs.logprobs, inputs.sampled_mask), inputs.sampled_mask)
    assert (weights == 1).all()
    both = (evaluate(loss, replace(inputs, importance_weights=value)) for value in (None, weights))
    (plain, gradient), (weighted, weighted_gradient) = both
    assert torch.equal(plain.loss, weighted.loss) and torch.equal(gradient, weighted_gradient)
    assert plain.metrics == weighted.metrics


@few
@pytest.mark.parametrize("options", OPTIONS)
@given(inputs=loss_inputs(max_tokens=1, min_tokens=1))
def test_gspo_is_grpo_on_completions_of_one_token(options, inputs):
    kinds = (losses.GRPOLoss, losses.GSPOLoss)
    (grpo, grpo_gradient), (gspo, gspo_gradient) = (evaluate(kind(0.02, 0.03, **options), inputs) for kind in kinds)
    assert close(grpo.loss, gspo.loss) and close(grpo_gradient, gspo_gradient)
    assert all(close(value, gspo.metrics[name]) for name, value in grpo.metrics.items())


@each_loss
@few
@given(inputs=loss_inputs())
def test_no_advantage_no_gradient(loss, inputs):
    if loss.needs_reference:  # the KL alone pulls then, and to nowhere if the policy is the reference
        inputs = replace(inputs, ref_logprobs=inputs.logprobs)
    output, gradient = evaluate(loss, replace(inputs, advantages=torch.zeros_like(inputs.advantages)))
    if loss.needs_entropy:
        mask = inputs.sampled_mask
        bonus = -0.1 * F.mean_over_tokens(inputs.entropy - 0.3 * inputs.logprobs, mask)
        assert close(output.loss, bonus) and close(gradient, 0.03 * mask.double() / mask.sum().clamp(min=1))
    else:
        assert output.loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("cls", [losses.GRPOLoss, losses.GSPOLoss])
@few
@given(inputs=loss_inputs(min_tokens=1), beyond=st.floats(1e-6, 2.0))
def test_the_clip_stops_the_gradient_on_the_right_side_only(cls, inputs, beyond):
    loss, sign = cls(0.02, 0.03), inputs.advantages.sign()[:, None]
    up, down = torch.tensor(1.03).log() + beyond, torch.tensor(0.98).log() - beyond
    for step, stopped in ((up, sign > 0), (down, sign < 0)):  # every ratio beyond the range, above or below
        output, gradient = evaluate(loss, replace(inputs, old_logprobs=inputs.logprobs - step))
        idle = stopped | (sign == 0) | ~inputs.sampled_mask
        assert torch.equal(gradient == 0, idle)
        assert (gradient[~idle] * sign.expand_as(gradient)[~idle] < 0).all()  # descent makes good tokens likelier
        flagged = stopped.double() if cls is losses.GSPOLoss else (stopped & inputs.sampled_mask).double()
        count = len(sign) if cls is losses.GSPOLoss else inputs.sampled_mask.sum()
        assert close(output.metrics["clip_ratio/region_mean"], flagged.sum() / count)


@few
@given(inputs=loss_inputs())
def test_k3_is_never_negative_and_zero_only_between_equals(inputs):
    kl = F.k3_kl(inputs.logprobs, inputs.ref_logprobs, inputs.sampled_mask)
    assert (kl >= 0).all() and (kl[~inputs.sampled_mask] == 0).all()
    assert torch.equal(kl > 0, inputs.sampled_mask & (inputs.logprobs != inputs.ref_logprobs))
