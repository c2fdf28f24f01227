"""What `PolicyLoss` promises of every loss, its own or a user's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from scalar_reference import CLIPPED, make_inputs

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, GSPOTokenLoss, PolicyLoss, SAPOLoss
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs

LOSSES = [GRPOLoss(kl_coef=0.1), GSPOLoss(kl_coef=0.1, kl_importance_weight=True)]


class SoftLoss(PolicyLoss):
    """A user's loss, with its own term and aggregation (SAPO's gate, DAPO's mean)."""

    def policy_term(self, inputs, old_logprobs):
        ratio = torch.exp(inputs.logprobs - old_logprobs)  # needs no mask: padding is 0 in both
        return -inputs.advantages[:, None] * 2 * torch.sigmoid(2 * (ratio - 1)), ratio

    def aggregate(self, per_token_loss, inputs):
        return F.mean_over_tokens(per_token_loss, inputs.sampled_mask, inputs.num_tokens)


def test_a_loss_of_ones_own():
    inputs = make_inputs()
    output = SoftLoss(kl_coef=0.5)(inputs)
    ratio, ahead = (inputs.logprobs - inputs.old_logprobs).exp(), inputs.ref_logprobs - inputs.logprobs
    term = -inputs.advantages[:, None] * 2 * torch.sigmoid(2 * (ratio - 1)) + 0.5 * (ahead.exp() - ahead - 1)
    assert torch.allclose(output.loss, term[inputs.sampled_mask].mean())
    assert set(output.metrics) == {"kl", "ratio/mean", "ratio/max"}


@pytest.mark.parametrize("num", [None, 0.0])
@pytest.mark.parametrize("loss", [*LOSSES, SoftLoss(kl_coef=0.1)])
def test_a_fully_masked_batch_gives_a_differentiable_zero(loss, num):
    inputs = make_inputs()
    nothing = torch.full_like(inputs.logprobs, math.nan)
    mask, values = torch.zeros_like(inputs.sampled_mask), {"old_logprobs": nothing, "ref_logprobs": nothing}
    advantages = torch.full_like(inputs.advantages, math.nan)
    inputs = LossInputs(nothing.clone().requires_grad_(), advantages, mask, **values, num_sequences=num, num_tokens=num)
    output = loss(inputs)
    assert output.loss.item() == 0 and not torch.autograd.grad(output.loss, inputs.logprobs)[0].any()
    assert all(torch.isfinite(value) for value in output.metrics.values())
    assert output.metrics["ratio/max"] == 0 and output.metrics["kl"] == 0
    names = ("logprobs", "advantages", "sampled_mask", "ref_logprobs")
    empty = loss(replace(inputs, old_logprobs=None, **{name: getattr(inputs, name)[:0] for name in names}))
    assert empty.loss.item() == 0 and empty.loss.requires_grad, "no sequences at all"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_only_logprobs_get_a_gradient(loss, dtype):
    inputs = make_inputs(dtype=dtype)
    inputs = replace(inputs, importance_weights=torch.full_like(inputs.logprobs, 0.5).detach())
    names = ("logprobs", "advantages", "old_logprobs", "ref_logprobs", "importance_weights")
    upcast = replace(inputs, **{name: getattr(inputs, name).detach().float().requires_grad_() for name in names})
    output, wide = loss(inputs), loss(upcast)
    assert output.loss.dtype == torch.float32 and torch.equal(output.loss, wide.loss)
    output.loss.backward()
    wide.loss.backward()
    assert torch.equal(inputs.logprobs.grad, upcast.logprobs.grad.to(dtype)) and inputs.logprobs.grad.any()
    assert all(getattr(upcast, name).grad is None for name in names[1:])
    assert not any(value.requires_grad for value in output.metrics.values())
    others = {"old_logprobs": inputs.old_logprobs.double(), "advantages": inputs.advantages.bfloat16()}
    assert loss(replace(inputs, **others)).loss.dtype == torch.float32, "the policy's dtype decides"


def test_a_loss_without_a_gradient_names_its_class():
    class Detached(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            return -inputs.logprobs.detach(), inputs.logprobs.detach().exp()

    with pytest.raises(ConfigError, match=r"Detached: the loss has no gradient; compute policy_term from inputs\.logprobs"):
        Detached()(make_inputs())
    with torch.no_grad():
        assert Detached()(make_inputs()).loss.isfinite(), "where none is wanted"


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (GSPOLoss(), {"logprobs": torch.zeros(6)}, r"logprobs has shape \(6,\)"),
        (GSPOLoss(), {"advantages": torch.zeros(6, 1)}, r"advantages has shape \(6, 1\).*must be \(6,\)"),
        (GRPOLoss(kl_coef=0.1), {"ref_logprobs": None}, r"kl_coef is not 0, but ref_logprobs is None; .*kl_coef=0"),
        (GRPOLoss(entropy_coef=0.1), {"entropy": torch.ones(6, 5)}, r"but entropy has no gradient; .*set entropy_coef=0"),
    ],
)
def test_bad_inputs_are_refused(loss, changes, message):
    with pytest.raises(ConfigError, match=f"{type(loss).__name__}: .*{message}"):
        loss(replace(make_inputs(), **changes))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: (x, x.sum()), r"policy_term returned a ratio of shape \(\); return \(6, 5\)"),
        (lambda x: (x, x.exp()), r"aggregate returned a loss of shape \(6,\); return \(\)$"),
    ],
)
def test_what_a_loss_of_ones_own_returns_wrongly_names_its_class(returned, message):
    class Mine(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            return returned(inputs.logprobs)

        def aggregate(self, per_token_loss, inputs):
            return per_token_loss.sum(dim=1)

    with pytest.raises(ConfigError, match=rf"Mine\.{message}"):
        Mine()(make_inputs())


SEQUENCE_RATIOS = [GSPOLoss, GSPOTokenLoss]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (GRPOLoss, {"clip_low": -0.1}, r"clip_low=-0.1 must be at least 0 and below 1"),
        (GSPOLoss, {"clip_low": 1.0}, r"clip_low=1.0 must be at least 0 and below 1"),
        (DrGRPOLoss, {"clip_high": -0.1}, r"clip_high=-0.1 must be finite and at least 0"),
        (GSPOTokenLoss, {"dual_clip": 1.0}, r"dual_clip=1.0 must be .* above 1 \+ clip_high"),
        (CISPOLoss, {"cap": 1.0}, r"cap=1.0 must be finite and above 1"),
        (SAPOLoss, {"tau_positive": 0.0}, r"tau_positive=0.0 must be finite and above 0"),
        (GRPOLoss, {"kl_coef": -0.1}, "kl_coef=-0.1 is not a weight; use 0"),
        (SAPOLoss, {"entropy_coef": math.nan}, "entropy_coef=nan is not a weight; use 0"),
    ],
)
def test_values_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: {message}"):
        cls(**options)


@pytest.mark.parametrize("cls", CLIPPED)
def test_clip_ranges_are_the_papers_by_default_and_losses_of_tokens_and_of_sequences_refuse_each_others(cls):
    loss, clips = cls(), (3e-4, 4e-4) if cls in SEQUENCE_RATIOS else (0.2, 0.28) if cls is DAPOLoss else (0.2, 0.2)
    assert (loss.clip_low, loss.clip_high, loss.dual_clip, loss.kl_coef, loss.entropy_coef) == (*clips, None, 0.0, 0.0)
    wrong = [(0.1, 0.1), (3e-4, 0.28)] if cls in SEQUENCE_RATIOS else [(3e-4, 4e-4), (0.2, 5e-3)]
    remedy = "set clip_low=3e-4 and clip_high=4e-4" if cls in SEQUENCE_RATIOS else "set clip_low=0.2 and clip_high=0.2"
    for clips in wrong:
        with pytest.raises(ConfigError, match=rf"{cls.__name__}: .*{remedy}"):
            cls(*clips)


def test_a_policy_term_that_is_no_pair_is_refused_in_one_line():
    class OneTensor(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            return -inputs.advantages[:, None] * inputs.logprobs

    for count in (2, 3):  # the rows of two sequences are not a pair, either
        with pytest.raises(
            ConfigError, match=r"^OneTensor\.policy_term returned a Tensor; return \(cost, ratio\), where the ratio .*"
        ):
            OneTensor()(make_inputs(b=count))
    page = (Path(__file__).parents[2] / "docs/how-to/own-parts.md").read_text(encoding="utf-8")
    assert "`policy_term` returns `(cost, ratio)`" in page and "REINFORCE returns `F.token_ratio`" in page


def test_the_ratio_gives_reinforce_its_gradient():
    """As docs/how-to/own-parts.md says: of the cost -ratio A, where the policy is the one that sampled."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    ratio = F.token_ratio(logprobs, logprobs.detach(), torch.ones(2, 2, dtype=torch.bool))
    advantages = torch.tensor([2.0, -1.0])[:, None]
    (gradient,) = torch.autograd.grad((-ratio * advantages).sum(), logprobs)
    (of_reinforce,) = torch.autograd.grad((-logprobs * advantages).sum(), logprobs)
    assert torch.equal(ratio, torch.ones(2, 2)) and torch.equal(gradient, of_reinforce)


def switched(to, *arguments):
    """A loss with GRPO's range after jsonargparse alone, as in a LightningCLI of one's own, has switched its class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PolicyLoss)
    given = "--loss={class_path: GRPOLoss, init_args: {clip_low: 0.2, clip_high: 0.2, kl_coef: 0.1}}"
    return parser.instantiate(parser.parse_args([given, f"--loss={to}", *arguments])).loss


def test_a_class_switched_on_the_command_line_notices_the_range_that_is_left_or_inherits_none():
    with pytest.raises(ConfigError, match=r"GSPOLoss: .* left over from a GRPO config"):
        switched("GSPOLoss")
    loss = switched("GSPOLoss", "--loss.clip_low=3e-4", "--loss.clip_high=4e-4")
    assert type(loss) is GSPOLoss and (loss.clip_low, loss.clip_high) == (3e-4, 4e-4)
    for to in (CISPOLoss, SAPOLoss):
        loss, plain = switched(to.__name__), to(kl_coef=0.1)
        assert type(loss) is to and vars(loss) | {"_init_args": None} == vars(plain) | {"_init_args": None}
