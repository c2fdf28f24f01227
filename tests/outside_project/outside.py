"""A reward and a loss of a project that depends on the package; its.yaml names them."""

import re

from hybrid_lightning.losses import PolicyLoss
from hybrid_lightning.losses import functional as F
from hybrid_lightning.rewards import RewardFunction


class LastDigit(RewardFunction):
    """A share for the last digit, the rest for the whole number."""

    def __init__(self, share: float = 0.25) -> None:
        self.share = share

    def __call__(self, completions, prompts):
        found = [(re.findall(r"\d+", text) or [" "])[-1] for text in completions]
        pairs = [(number, prompt.answer) for number, prompt in zip(found, prompts, strict=True)]
        return [1.0 if number == answer else self.share * (number[-1] == answer[-1]) for number, answer in pairs]


class CappedLoss(PolicyLoss):
    """REINFORCE with ratios up to a cap."""

    def __init__(self, cap: float = 2.0, kl_coef: float = 0.0) -> None:
        super().__init__(kl_coef=kl_coef)
        self.cap = cap

    def policy_term(self, inputs, old_logprobs):
        ratio = F.token_ratio(inputs.logprobs, old_logprobs, inputs.sampled_mask)
        return -ratio.detach().clamp(max=self.cap) * inputs.advantages[:, None] * inputs.logprobs, ratio
