"""Top-entropy mask: only the most entropic tokens get a policy gradient (Beyond the 80/20 Rule, arXiv 2506.01939, section 5).

    L = aggregate( 1[H_t >= threshold] policy_term_t )

H_t is the entropy of the distribution from which token t was drawn, after the temperature. The threshold is chosen so that a
given share of the tokens reaches it. Most tokens of a solution follow from the tokens before them. Only a few tokens decide which
way it goes, and learning depends on these: in the paper a 32B model learned more from 20% of the tokens than from all.

Departures from the paper:

- The threshold is over all sampled tokens of the optimizer step, over its micro-batches and ranks, so that splitting a step
  changes neither the mask nor the gradient. In the paper and in TRL it is over a micro-batch.
- Tokens of sequences without advantage do not count: their policy gradient is zero anyway.
- The entropies come from the policy that sampled, computed together with the old log-probabilities, because they must be known
  before the first backward pass of a step. The paper takes the entropies of the policy that is being trained. On the first
  minibatch of a rollout, which is exactly on-policy, both are the same; computing them beforehand costs an extra forward pass.

Tokens that are left out stay in the loss's denominators (as in the paper and in TRL). The KL and the entropy bonus are over all
tokens. All tokens at the threshold are kept. Scoring for the adapter's plan uses the gradient of all tokens.
"""

import math

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable


class TopEntropyMask(Configurable):
    """Chooses the most entropic tokens of an optimizer step.

    Args:
        share: Share of the tokens that get a policy gradient.

    Raises:
        ConfigError: If `share` is not above 0 and at most 1.

    Example:
        >>> TopEntropyMask(share=0.5).threshold(torch.tensor([0.1, 0.9, 0.2, 0.4]))
        0.4000000059604645
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"{type(self).__name__}: share={share} must be above 0 and at most 1; set e.g. 0.2 for a fifth")
        self.share = share

    def threshold(self, entropies: Tensor) -> float:
        """The entropy that `share` of the tokens reach: the (1 - share) quantile, rounded up to the entropy of a token.

        Args:
            entropies: Entropies of all tokens that contribute, in nats, [N] float32; N may be 0.

        Returns:
            The threshold: tokens with at least this entropy get a policy gradient.
        """
        if not len(entropies):
            return math.inf
        # Not `torch.quantile`, which takes at most 16 million numbers. Subtracting 1e-9 undoes rounding, such as in 1 - 0.7.
        below = math.ceil((1 - self.share) * (len(entropies) - 1) - 1e-9)
        return float(torch.sort(entropies).values[below])
