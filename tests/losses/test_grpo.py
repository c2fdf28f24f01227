"""What only the losses with one ratio per token have."""

import warnings
from dataclasses import replace

import pytest
import torch
from scalar_reference import CLIPS, make_inputs

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import BNPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss
from hybrid_lightning.types import LossInputs


def test_dapo_without_clip_higher_is_told_of():
    """A range of `GRPOLoss` that is left over is one that DAPO may have on purpose too, so it is no error."""
    with pytest.warns(UserWarning, match=r"clip_high=0.2 is not above clip_low=0.2, .* no clip-higher"):
        DAPOLoss(0.2, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DAPOLoss(0.2, 0.28)


def test_where_each_micro_batch_is_one_completion_bnpo_is_grpo_and_in_one_micro_batch_dapo():
    inputs = make_inputs(b=5, spread=0.3)
    bnpo, fields = BNPOLoss(*CLIPS), ("logprobs", "advantages", "completion_mask", "old_logprobs")
    rows = [LossInputs(*(getattr(inputs, f)[i : i + 1] for f in fields), num_micro_batches=5.0) for i in range(5)]
    torch.testing.assert_close(sum(bnpo(row).loss for row in rows), GRPOLoss(*CLIPS)(inputs).loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(bnpo(inputs).loss, DAPOLoss(*CLIPS)(inputs).loss, rtol=1e-12, atol=0)


def test_dr_grpo_must_know_the_longest_completion():
    with pytest.raises(ConfigError, match=r"DrGRPOLoss: max_completion_tokens is None.*give the max_new_tokens of the sampler"):
        DrGRPOLoss()(replace(make_inputs(), max_completion_tokens=None))
