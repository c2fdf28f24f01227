"""What `PolicyLoss` promises of every loss, its own or a user's."""

import math
from dataclasses import replace

import pytest
import torch
from scalar_reference import CLIPS, make_inputs

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import GRPOLoss, GSPOLoss, PolicyLoss, combine_metrics
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs

LOSSES = [GRPOLoss(kl_coef=0.1), GSPOLoss(kl_coef=0.1, kl_importance_weight=True)]


class SoftLoss(PolicyLoss):
    """A user's loss, with its own term and aggregation (SAPO's gate, DAPO's mean)."""

    def __init__(self, tau: float = 1.0, kl_coef: float = 0.0) -> None:
        super().__init__(kl_coef=kl_coef)
        self.tau = tau

    def policy_term(self, inputs, old_logprobs):
        ratio = torch.exp(inputs.logprobs - old_logprobs)  # needs no mask: padding is 0 in both
        return -inputs.advantages[:, None] * 4 / self.tau * torch.sigmoid(self.tau * (ratio - 1)), ratio

    def aggregate(self, per_token_loss, inputs):
        return F.mean_over_tokens(per_token_loss, inputs.completion_mask, inputs.num_tokens)


def gradient(loss: PolicyLoss, inputs: LossInputs) -> torch.Tensor:
    return torch.autograd.grad(loss(inputs).loss, inputs.logprobs)[0]


def test_a_loss_of_ones_own():
    inputs = make_inputs()
    output = SoftLoss(tau=2.0, kl_coef=0.5)(inputs)
    mask = inputs.completion_mask
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    difference = inputs.ref_logprobs - inputs.logprobs
    term = -inputs.advantages[:, None] * 2 * torch.sigmoid(2 * (ratio - 1)) + 0.5 * (difference.exp() - difference - 1)
    assert torch.allclose(output.loss, term[mask].mean())
    assert set(output.metrics) == {"kl", "ratio/mean", "ratio/max"}
    assert SoftLoss(tau=2.0).to_config()["init_args"] == {"tau": 2.0}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("loss", [*LOSSES, SoftLoss(kl_coef=0.1)])
def test_padding_may_hold_anything(loss, bad):
    clean = make_inputs(t=7)
    mask = clean.completion_mask.clone()
    mask[2] = False  # and one sequence has no token at all
    clean = replace(clean, completion_mask=mask)
    fields = ("logprobs", "old_logprobs", "ref_logprobs")
    dirty = replace(clean, **{f: torch.where(mask, getattr(clean, f).detach(), bad) for f in fields})
    dirty.logprobs.requires_grad_()
    assert torch.equal(loss(dirty).loss, loss(clean).loss)
    assert torch.equal(gradient(loss, dirty), gradient(loss, clean))
    assert (gradient(loss, dirty)[~mask] == 0).all()
    for name, value in loss(dirty).metrics.items():
        assert torch.equal(value, loss(clean).metrics[name]), name


@pytest.mark.parametrize("num", [None, 0.0])
@pytest.mark.parametrize("loss", [*LOSSES, SoftLoss(kl_coef=0.1)])
def test_a_fully_masked_batch_gives_a_differentiable_zero(loss, num):
    inputs = make_inputs()
    nothing = torch.full_like(inputs.logprobs, math.nan)
    inputs = LossInputs(
        nothing.clone().requires_grad_(),
        torch.full_like(inputs.advantages, math.nan),
        torch.zeros_like(inputs.completion_mask),
        old_logprobs=nothing,
        ref_logprobs=nothing,
        num_sequences=num,
        num_tokens=num,
    )
    output = loss(inputs)
    assert output.loss.item() == 0 and (gradient(loss, inputs) == 0).all()
    assert all(torch.isfinite(value) for value in output.metrics.values())
    assert output.metrics["ratio/max"] == 0 and output.metrics["kl"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_no_sequences_at_all(loss):
    inputs = make_inputs()
    empty = LossInputs(*(getattr(inputs, f)[:0] for f in ("logprobs", "advantages", "completion_mask")))
    empty = replace(empty, ref_logprobs=empty.logprobs.detach())
    output = loss(empty)
    assert output.loss.item() == 0 and output.loss.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_logprobs_the_policy_is_its_own_sampler(loss):
    inputs = make_inputs()
    implicit = replace(inputs, old_logprobs=None)
    explicit = replace(inputs, old_logprobs=inputs.logprobs.detach().clone())
    assert torch.equal(loss(implicit).loss, loss(explicit).loss)
    assert torch.equal(gradient(loss, implicit), gradient(loss, explicit))
    metrics = loss(implicit).metrics
    assert metrics["ratio/max"] == 1 and metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_only_logprobs_get_a_gradient(loss):
    inputs = make_inputs()
    names = ("advantages", "old_logprobs", "ref_logprobs", "importance_weights")
    inputs = replace(inputs, importance_weights=torch.full_like(inputs.logprobs, 0.5))
    others = [getattr(inputs, name).detach().clone().requires_grad_() for name in names]
    inputs = replace(inputs, **dict(zip(names, others, strict=True)))
    output = loss(inputs)
    output.loss.backward()
    assert inputs.logprobs.grad.abs().sum() > 0 and all(value.grad is None for value in others)
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(loss, dtype):
    inputs = make_inputs(dtype=dtype)
    want = torch.promote_types(dtype, torch.float32)
    leaf = inputs.logprobs
    fields = ("logprobs", "advantages", "old_logprobs", "ref_logprobs")
    upcast = replace(inputs, **{f: getattr(inputs, f).detach().to(want) for f in fields})
    upcast.logprobs.requires_grad_()
    output = loss(inputs)
    assert output.loss.dtype == want and torch.equal(output.loss, loss(upcast).loss)
    assert gradient(loss, inputs).dtype == dtype
    assert torch.equal(gradient(loss, inputs), gradient(loss, upcast).to(dtype)) and leaf.dtype == dtype


def test_mixed_dtypes_follow_the_policy():
    inputs = make_inputs()
    mixed = replace(inputs, old_logprobs=inputs.old_logprobs.float(), advantages=inputs.advantages.bfloat16())
    assert LOSSES[0](mixed).loss.dtype == torch.float64


@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss])
def test_shares_and_metrics_of_micro_batches_add_up(cls):
    loss, whole = cls(*CLIPS, kl_coef=0.1), make_inputs(b=7, spread=0.05)
    counts = {"num_sequences": 7.0, "num_tokens": float(whole.completion_mask.sum())}
    parts = []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        fields = ("logprobs", "advantages", "completion_mask", "old_logprobs", "ref_logprobs")
        parts.append(loss(LossInputs(*(getattr(whole, f)[rows] for f in fields), **counts)))
    assert torch.allclose(sum(part.loss for part in parts), loss(whole).loss, rtol=1e-12)
    joined, together = combine_metrics(part.metrics for part in parts), loss(whole).metrics
    assert set(joined) == set(together) and 0 < together["clip_ratio/region_mean"] < 1
    for name in joined:
        assert torch.allclose(joined[name], together[name], rtol=1e-12), name


def test_missing_reference_is_refused_with_remedy():
    with pytest.raises(ConfigError, match=r"GRPOLoss: kl_coef is not 0, but ref_logprobs is None: .*kl_coef=0"):
        GRPOLoss(kl_coef=0.1)(replace(make_inputs(), ref_logprobs=None))
    assert GRPOLoss(kl_coef=0.1).needs_reference and not GRPOLoss().needs_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": torch.zeros(6)}, r"logprobs has shape \(6,\)"),
        ({"logprobs": torch.zeros(6, 5, dtype=torch.long)}, r"logprobs is torch.int64.*float"),
        ({"advantages": torch.zeros(6, 1)}, r"advantages has shape \(6, 1\).*must be \(6,\)"),
        ({"advantages": torch.zeros(5)}, r"advantages has shape \(5,\)"),
        ({"old_logprobs": torch.zeros(6, 4)}, r"old_logprobs has shape \(6, 4\)"),
        ({"ref_logprobs": torch.zeros(1, 5)}, r"ref_logprobs has shape \(1, 5\)"),
        ({"importance_weights": torch.zeros(6)}, r"importance_weights has shape \(6,\).*must be \(6, 5\)"),
        ({"importance_weights": torch.ones(6, 5, dtype=torch.bool)}, r"importance_weights is torch.bool.*float"),
        ({"completion_mask": torch.ones(6, 5)}, r"completion_mask is torch.float32.*bool"),
        ({"completion_mask": torch.ones(6, 1, dtype=torch.bool)}, r"completion_mask has shape \(6, 1\)"),
        ({"num_sequences": -1.0}, r"num_sequences=-1.0"),
        ({"num_tokens": math.nan}, r"num_tokens=nan"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GSPOLoss()(replace(make_inputs(), **changes))
    assert "\n" not in str(caught.value) and "GSPOLoss" in str(caught.value)


@pytest.mark.parametrize("what", ["loss", "ratio"])
def test_a_policy_term_of_wrong_shape_names_its_class(what):
    class Flat(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            good, bad = inputs.logprobs, inputs.logprobs.sum()
            return (bad, good) if what == "loss" else (good, bad)

    with pytest.raises(ConfigError, match=rf"Flat.policy_term returned a {what} of shape \(\): return \(6, 5\)"):
        Flat()(make_inputs())


@pytest.mark.parametrize(("returned", "message"), [(lambda x: -x, "a Tensor"), (lambda x: (x, x, x), "3 values")])
def test_a_policy_term_without_its_ratio_says_what_to_return(returned, message):
    class Forgetful(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            return returned(inputs.logprobs)

    with pytest.raises(
        ConfigError, match=rf"Forgetful.policy_term returned {message}: return two tensors, the loss and the ratio"
    ):
        Forgetful()(make_inputs())


def test_a_loss_without_a_gradient_names_its_class():
    class Detached(PolicyLoss):
        def policy_term(self, inputs, old_logprobs):
            return -inputs.logprobs.detach(), inputs.logprobs.detach().exp()

    inputs = make_inputs()
    with pytest.raises(ConfigError, match=r"Detached: the loss has no gradient: compute policy_term from inputs\.logprobs"):
        Detached()(replace(inputs, logprobs=inputs.logprobs.detach().requires_grad_()))
    with torch.no_grad():
        assert Detached()(inputs).loss.isfinite(), "where none is wanted"


def test_an_aggregation_that_is_no_number_names_its_class():
    class Unreduced(SoftLoss):
        def aggregate(self, per_token_loss, inputs):
            return per_token_loss.sum(dim=1)

    with pytest.raises(ConfigError, match=r"Unreduced.aggregate returned a loss of shape \(6,\): return \(\)\."):
        Unreduced()(make_inputs())


@pytest.mark.parametrize("kl_coef", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("cls", [GRPOLoss, GSPOLoss, SoftLoss])
def test_bad_kl_coef(cls, kl_coef):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: kl_coef={kl_coef}"):
        cls(kl_coef=kl_coef)
