"""Values against a scalar loop, gradients against finite differences, and each loss's description of itself."""

import pickle
from dataclasses import replace

import pytest
import torch
from scalar_reference import CLIPPED, CLIPS, SETTINGS, make_inputs, scalar_loss

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import BNPOLoss, CISPOLoss, DPPOLoss, GSPOLoss, GSPOTokenLoss

CASES = [
    {},
    {"dual_clip": 1.1},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_importance_weight": True, "entropy_coef": 0.1},
    {"kl_coef": 0.3, "kl_importance_weight": True, "dual_clip": 1.1},
    {"kl_coef": 0.3, "off_policy_mask_threshold": 0.02},
]
ALL = [(cls, options) for cls in SETTINGS for options in CASES if cls in CLIPPED or "dual_clip" not in options]
each_class = pytest.mark.parametrize("cls", SETTINGS)


@pytest.mark.parametrize("episodes", [None, [0, 0, 1, 2, 2, 2, 3, 4]], ids=["of one row", "of several rows"])
@pytest.mark.parametrize("advantages", ["of sequences", "of tokens"])
@pytest.mark.parametrize(("cls", "options"), ALL)
def test_values_equal_a_scalar_loop(cls, options, advantages, episodes):
    inputs = make_inputs(seed=1, b=8, t=6, spread=0.3)
    if episodes is not None:  # rows share the weight of their episode by their tokens
        tokens, of_rows = inputs.sampled_mask.sum(dim=1).double(), torch.tensor(episodes)
        weights = tokens / torch.zeros(5, dtype=torch.float64).index_add(0, of_rows, tokens)[of_rows]
        inputs = replace(inputs, row_weights=weights)
    loss = cls(**SETTINGS[cls], **options)
    if advantages == "of tokens":
        inputs = with_token_advantages(inputs)
        if cls is GSPOLoss:
            with pytest.raises(ConfigError, match="GSPOLoss takes one advantage per sequence"):
                loss(inputs)
            return
    output, want = loss(inputs), scalar_loss(inputs, loss)
    assert output.loss.item() == pytest.approx(want.pop("loss"), rel=1e-12)
    assert all(value > 0 for name, value in want.items() if "clip" in name or "off" in name) and want["ratio/max"] > 1.1
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(want, rel=1e-12)
    output.loss.backward()
    assert inputs.logprobs.grad.isfinite().all()


def with_token_advantages(inputs):
    """The same with an advantage of each token; where nothing was sampled it is nan."""
    of_tokens = torch.randn(inputs.logprobs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return replace(inputs, advantages=of_tokens.masked_fill(~inputs.sampled_mask, torch.nan))


# Not the two that stop gradients of ratios: runs compare their gradients with equations.
@pytest.mark.parametrize(("cls", "options"), [case for case in ALL if case[0] not in (CISPOLoss, GSPOTokenLoss)])
def test_gradcheck(cls, options):
    inputs = make_inputs(seed=0, b=4, t=4, spread=0.15)
    loss = cls(**SETTINGS[cls], **options)
    if cls in CLIPPED:
        kinks = torch.tensor([1 - CLIPS[0], 1 + CLIPS[1], 1.1], dtype=torch.float64)
        ratios = loss.ratio(inputs, inputs.old_logprobs).detach()
        assert (ratios[..., None] - kinks).abs().min() > 1e-4, "finite differences must not step over a kink"
    counts = {"num_sequences": 5.0, "num_tokens": 20.0, "micro_batch_tokens": 15.0, "num_micro_batches": 2.0}

    def value(logprobs, entropy):
        return loss(replace(inputs, logprobs=logprobs, entropy=entropy, **counts)).loss

    assert torch.autograd.gradcheck(value, (inputs.logprobs, inputs.entropy))


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}])
@each_class
def test_a_loss_that_ignores_sequences_without_advantage_does_not_change_without_them(cls, options):
    loss, inputs = cls(**SETTINGS[cls], **options), make_inputs(b=8, spread=0.3)
    advantages = with_token_advantages(inputs).advantages if loss.takes_token_advantages else inputs.advantages.clone()
    advantages[::2] = 0
    counts = {"num_sequences": 8.0, "num_tokens": float(inputs.sampled_mask.sum())}
    whole = replace(inputs, advantages=advantages, **counts)
    names = ("logprobs", "advantages", "sampled_mask", "old_logprobs", "ref_logprobs", "sampling_logprobs", "entropy")
    some = replace(whole, **{name: getattr(whole, name)[1::2] for name in names})
    same = torch.allclose(loss(some).loss, loss(whole).loss, rtol=1e-12)
    assert same == loss.ignores_zero_advantage == (not options and cls not in (BNPOLoss, DPPOLoss))


@each_class
def test_losses_pickle_and_describe_themselves(cls):
    loss = cls(**SETTINGS[cls], kl_coef=0.1)
    assert vars(pickle.loads(pickle.dumps(loss))) == vars(loss)
    assert loss.to_config()["init_args"] == {**SETTINGS[cls], "kl_coef": 0.1}
