"""Importance corrections against a scalar loop; their weights in losses against TRL, in `parity`, and equations, in runs."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from scalar_reference import make_inputs

from hybrid_lightning import losses
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F

CLASSES = [losses.TokenTruncation, losses.TokenMask, losses.SequenceTruncation, losses.SequenceMask]


def by_hand(cls, log_ratios, cap, floor):
    """Weight of each token of a sequence, in Python numbers."""
    sequence = math.exp(sum(log_ratios))
    whole = cls in (losses.SequenceTruncation, losses.SequenceMask)
    ratios = [sequence if whole else math.exp(log_ratio) for log_ratio in log_ratios]
    if cls in (losses.TokenTruncation, losses.SequenceTruncation):
        return [min(max(ratio, floor), cap) for ratio in ratios]
    return [ratio if floor <= ratio <= cap else 0.0 for ratio in ratios]


@pytest.mark.parametrize(("cls", "bounds"), list(zip(CLASSES, [{}, {"cap": 1.3, "floor": 0.8}] * 2, strict=True)))
def test_weights_equal_a_scalar_loop(cls, bounds):
    inputs = make_inputs(b=20, t=6, spread=0.5)
    mask, weights = inputs.sampled_mask, cls(**bounds)(inputs.logprobs, inputs.old_logprobs, inputs.sampled_mask)
    assert not weights.requires_grad
    found = F.per_token(weights, mask)[mask].tolist()
    rows = zip(inputs.logprobs - inputs.old_logprobs, mask, strict=True)
    bounds = {"cap": 2.0, "floor": 0.0, **bounds}
    wanted = [weight for row, used in rows for weight in by_hand(cls, row[used].tolist(), **bounds)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert 0 < sum(value in (0.0, *bounds.values()) for value in found) < len(found), "some are bounded, and some are not"


@pytest.mark.parametrize("cls", [losses.TokenTruncation, losses.SequenceMask])
def test_ratios_that_overflow_are_bounded_too_and_padding_is_not_looked_at(cls):
    mask, above = torch.tensor([[True, False]]), 2.0 if cls is losses.TokenTruncation else 0.0
    logprobs, sampled = torch.tensor([[0.0, math.nan]]), torch.tensor([[-1000.0, -math.inf]])
    for one, other, weight in ((logprobs, sampled, above), (sampled, logprobs, 0.0), (logprobs, logprobs, 1.0)):
        assert F.per_token(cls()(one, other, mask), mask)[mask].item() == weight


@pytest.mark.parametrize(("cls", "options"), [(losses.TokenMask, {"cap": math.nan}), (losses.SequenceMask, {"floor": 1.0})])
def test_impossible_bounds_are_refused(cls, options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: {name}={value} must be .*1, the ratio where nothing differs; set"):
        cls(**options)


def test_a_correction_of_ones_own_and_one_that_a_config_names():
    class Flat(losses.ImportanceCorrection):
        def weights(self, log_ratio, mask):
            return log_ratio.exp().mean()

    inputs = make_inputs()
    with pytest.raises(ConfigError, match=r"Flat.weights returned shape \(\); return \(6, 5\) or, .* \(6,\)"):
        Flat()(inputs.logprobs, inputs.logprobs, inputs.sampled_mask)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--correction", type=losses.ImportanceCorrection | None, default=None)
    assert parser.instantiate(parser.parse_args([])).correction is None
    correction = parser.instantiate(parser.parse_args(["--correction=SequenceMask", "--correction.cap=3"])).correction
    assert type(correction) is losses.SequenceMask and correction.to_config()["init_args"] == {"cap": 3.0, "floor": 0.0}
