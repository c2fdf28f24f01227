"""Properties of the losses with one ratio per token."""

import warnings
from dataclasses import replace

import pytest
from scalar_reference import make_inputs

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import DAPOLoss, DrGRPOLoss


def test_dapo_without_clip_higher_is_told_of():
    """DAPO may have a range left over from `GRPOLoss` on purpose, so it is not an error."""
    with pytest.warns(UserWarning, match=r"clip_high=0.2 is not above clip_low=0.2, .* no clip-higher"):
        DAPOLoss(0.2, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DAPOLoss(0.2, 0.28)


def test_dr_grpo_must_know_the_longest_completion():
    with pytest.raises(ConfigError, match=r"DrGRPOLoss: max_completion_tokens is None.*give the max_new_tokens of the sampler"):
        DrGRPOLoss()(replace(make_inputs(), max_completion_tokens=None))
