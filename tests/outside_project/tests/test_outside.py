import torch
from outside import CappedLoss, LastDigit

from hybrid_lightning.types import LossInputs, Prompt


def test_the_reward_pays_for_the_last_digit():
    assert LastDigit(0.5)(["12", "32", "13", ""], [Prompt(text="3*4=", answer="12")] * 4) == [1.0, 0.5, 0.0, 0.0]


def test_the_loss_is_capped():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    inputs = LossInputs(logprobs, torch.tensor([1.0]), torch.ones(1, 2, dtype=torch.bool), old_logprobs=torch.full((1, 2), -5.0))
    CappedLoss(cap=3.0)(inputs).loss.backward()
    assert torch.equal(logprobs.grad, torch.full((1, 2), -1.5))  # the cap, over two tokens
