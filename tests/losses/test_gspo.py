"""What only the losses with one ratio per sequence have."""

from dataclasses import replace

import torch
from scalar_reference import CLIPS, make_inputs

from hybrid_lightning.losses import GSPOLoss, GSPOTokenLoss


def gradient(loss, inputs):
    return torch.autograd.grad(loss(inputs).loss, inputs.logprobs)[0]


def test_gspo_token_leaves_out_the_gradient_of_single_tokens():
    inputs = make_inputs(seed=3, b=12, spread=0.01)
    weights = torch.ones_like(inputs.logprobs.detach())
    weights[:, 0] = 0
    masked = replace(inputs, importance_weights=weights)
    token, sequence = gradient(GSPOTokenLoss(*CLIPS), masked), gradient(GSPOLoss(*CLIPS), masked)
    assert (token[:, 0] == 0).all() and (token != 0).any() and (sequence[:, 0] != 0).any()
