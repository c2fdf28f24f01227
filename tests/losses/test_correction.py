"""Bounds of importance corrections; their weights are shown in losses against TRL, in `parity`, and equations, in runs."""

import math

import pytest
import torch
from scalar_reference import make_inputs

from hybrid_lightning import losses
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import functional as F


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


def test_a_correction_of_ones_own_has_weights_of_tokens_or_of_sequences():
    class Flat(losses.ImportanceCorrection):
        def weights(self, log_ratio, mask):
            return log_ratio.exp().mean()

    inputs = make_inputs()
    with pytest.raises(ConfigError, match=r"Flat.weights returned shape \(\); return \(6, 5\) or, .* \(6,\)"):
        Flat()(inputs.logprobs, inputs.logprobs, inputs.sampled_mask)
