"""Distillation: how a policy p learns from a teacher q at the tokens that the policy sampled.

    SampledReverseKL     advantage of a token: A + coef * (log q(token) - log p_old(token)), the policy gradient of KL(p, q)
    ReverseKL            coef * KL(p, q), p over q, added to the loss of the token
    ForwardKL            coef * KL(q, p), likewise
    JensenShannon        coef * (beta KL(q, m) + (1 - beta) KL(p, m)), m = beta q + (1 - beta) p, likewise

The first needs only the teacher's log-probability of each sampled token (Thinking Machines, "On-Policy Distillation", 2025). The
others need its whole distribution (GKD, arXiv 2306.13649, with its beta). All are per token, with no credit for later tokens, at
the sampling temperature. Divergences are aggregated like the loss's KL term, and not weighted by an importance ratio.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable


class Distillation(Configurable):
    """Base class of methods that learn from a teacher.

    Args:
        coef: Weight relative to the other terms of the loss.
    """

    of_distributions = False  # whether the teacher's whole distributions are needed

    def __init__(self, coef: float = 1.0) -> None:
        if not (math.isfinite(coef) and coef > 0):
            raise ConfigError(f"{type(self).__name__}: coef={coef} must be finite and above 0; leave model.teacher out for none")
        self.coef = coef


class SampledReverseKL(Distillation):
    """The log-ratio of teacher and policy at the sampled token as its advantage: the policy gradient of the reverse KL."""


class Divergence(Distillation):
    """Base class of divergences over the vocabulary; a subclass defines `of_logprobs`.

    Args:
        top_k: Compare only this many tokens, the most probable ones under the distribution that weights the divergence, and treat
            all others as one token; 0 compares the whole vocabulary.
    """

    of_distributions = True
    held_blocks = 7  # arrays [K, V] at its peak, for memory plans
    weighed_by_teacher = False  # whether `top_k` compares the teacher's most probable tokens, or the policy's

    def __init__(self, coef: float = 1.0, top_k: int = 0) -> None:
        super().__init__(coef)
        if top_k < 0:
            raise ConfigError(f"{type(self).__name__}: top_k={top_k} is not a number of tokens; set 0 for all, or e.g. 100")
        self.top_k = top_k
        self.held_blocks = 5 if top_k else self.held_blocks

    @abstractmethod
    def of_logprobs(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """The divergence of each token, [K] in nats, from log-probabilities [K, V]; the policy's have a gradient."""

    def __call__(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """`of_logprobs`, over the `top_k` tokens and the rest if `top_k` is set."""
        if 0 < self.top_k < policy.shape[1]:
            kept = (teacher if self.weighed_by_teacher else policy.detach()).topk(self.top_k, dim=1).indices
            policy, teacher = _with_rest(policy.gather(1, kept)), _with_rest(teacher.gather(1, kept))
        return self.of_logprobs(policy, teacher)


class ReverseKL(Divergence):
    """KL(p, q) = sum p (log p - log q): pulls the policy off tokens that are improbable for the teacher."""

    def of_logprobs(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """See `Divergence`."""
        return _kl(policy, teacher)


class ForwardKL(Divergence):
    """KL(q, p) = sum q (log q - log p): the quantity that supervised training on the teacher's own tokens would minimise here."""

    weighed_by_teacher = True

    def of_logprobs(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """See `Divergence`."""
        return _kl(teacher, policy)


class JensenShannon(Divergence):
    """The generalized Jensen-Shannon divergence of GKD, with the policy's `top_k`.

    Args:
        beta: The teacher's share in the mixture; towards 0 it behaves as the forward KL, towards 1 as the reverse KL.
    """

    held_blocks = 13

    def __init__(self, coef: float = 1.0, top_k: int = 0, beta: float = 0.5) -> None:
        super().__init__(coef, top_k)
        if not 0 < beta < 1:
            raise ConfigError(f"JensenShannon: beta={beta} must be between 0 and 1; use ForwardKL for 0 and ReverseKL for 1")
        self.beta = beta

    def of_logprobs(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """See `Divergence`."""
        mixture = torch.logaddexp(policy + math.log(1 - self.beta), teacher + math.log(self.beta))
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(policy, mixture)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one, other) of each row of log-probabilities, [K]; a token of probability 0 adds nothing."""
    return torch.where(one.isneginf(), 0.0, one.exp() * (one - other)).sum(dim=1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """Append to log-probabilities of some tokens [K, k] the log-probability of all other tokens together, [K, k + 1]."""
    known = logprobs.logsumexp(dim=1, keepdim=True).clamp(max=-1e-7)  # rounding may take it to 0, and the rest to nothing
    return torch.cat([logprobs, torch.log(-torch.expm1(known))], dim=1)
