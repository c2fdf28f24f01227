"""Top-entropy mask: only the most entropic tokens get a policy gradient (Beyond the 80/20 Rule, arXiv 2506.01939, section 5).

    L = aggregate( 1[H_t >= threshold] policy_term_t ),      threshold: that a share of the tokens reaches

H_t is the entropy of the distribution from which token t was drawn, after the temperature. Most tokens of a solution follow
from those before them; the few at which it could fork decide what is learned, and 20% of the tokens taught a 32B model more
than all.

The threshold is over all completion tokens of the optimizer step, over its micro-batches and ranks, so that splitting a step
changes neither the mask nor the gradient (in the paper and in TRL it is over a micro-batch). Tokens of sequences without
advantage, whose policy gradient is zero anyway, do not count. To be known before the first backward pass of a step, entropies
are those of the policy that sampled, computed when old log-probabilities are; the paper takes those of the policy as it is
being trained. On the first minibatch of a rollout, which is exactly on-policy, the two are the same, but cost a forward pass
that is otherwise not needed.

What is left out stays in the loss's denominators (as in the paper and TRL); the KL and the entropy bonus are of all tokens.
Ties at the threshold are all kept. Scoring for the adapter's plan uses the gradient of all tokens.
"""

import math

import torch
from torch import Tensor

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError


class TopEntropyMask(Configurable):
    """Chooses the most entropic tokens of an optimizer step.

    Args:
        share: of the tokens, which get a policy gradient.

    Raises:
        ConfigError: if `share` is not above 0 and at most 1.

    Example:
        >>> TopEntropyMask(share=0.5).threshold(torch.tensor([0.1, 0.9, 0.2, 0.4]))
        0.4000000059604645
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"{type(self).__name__}: share={share} must be above 0 and at most 1; set e.g. 0.2 for a fifth.")
        self.share = share

    def threshold(self, entropies: Tensor) -> float:
        """The entropy that `share` of the tokens reach: the (1 - share) quantile, rounded up to a token's.

        Args:
            entropies: [N] float32, of all tokens that take part, in nats; N may be 0.

        Returns:
            Tokens count whose entropy is at least this.
        """
        if not len(entropies):
            return math.inf
        # As `torch.quantile`, which takes no more than 16 million numbers; the small number undoes rounding such as 1 - 0.7.
        below = math.ceil((1 - self.share) * (len(entropies) - 1) - 1e-9)
        return float(torch.sort(entropies).values[below])
