"""Divergences from a teacher against scalar loops, their gradients, and their place in a policy loss."""

import math

import pytest
import torch

from hybrid_lightning import losses
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import LossInputs

K, V = 3, 6
DIVERGENCES = [losses.ReverseKL, losses.ForwardKL, losses.JensenShannon]
each = pytest.mark.parametrize(("cls", "top_k"), [(cls, top_k) for cls in DIVERGENCES for top_k in (0, 2)])


@pytest.fixture
def logprobs():
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(K, V, generator=generator, dtype=torch.float64)).log_softmax(1) for _ in range(2)]


def by_hand(cls, p, q, beta):
    """The divergence of two lists of probabilities."""
    if cls is losses.JensenShannon:
        mixture = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
        return beta * by_hand(losses.ReverseKL, q, mixture, 0) + (1 - beta) * by_hand(losses.ReverseKL, p, mixture, 0)
    p, q = (q, p) if cls is losses.ForwardKL else (p, q)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def kept(p, q, by, count):
    """The most probable tokens of one of them, and all others as one."""
    best = sorted(range(V), key=lambda token: -by[token])[:count]
    return [[some[token] for token in best] + [1 - sum(some[token] for token in best)] for some in (p, q)]


@each
def test_divergences_are_what_a_loop_over_tokens_gives(cls, top_k, logprobs):
    divergence = cls(top_k=top_k, beta=0.3) if cls is losses.JensenShannon else cls(top_k=top_k)
    rows = [[row.exp().tolist() for row in rows] for rows in logprobs]
    wanted = []
    for p, q in zip(*rows, strict=True):
        pair = kept(p, q, q if cls is losses.ForwardKL else p, top_k) if top_k else (p, q)
        wanted.append(by_hand(cls, *pair, 0.3))
    assert divergence(*logprobs).tolist() == pytest.approx(wanted, rel=1e-9)
    assert min(wanted) > 0.01
    torch.testing.assert_close(divergence(logprobs[0], logprobs[0]), torch.zeros(K, dtype=torch.float64), atol=1e-12, rtol=0)


@each
def test_gradients_of_logits(cls, top_k, logprobs):
    def of_logits(logits):
        return cls(top_k=top_k)(logits.log_softmax(1), logprobs[1])

    assert torch.autograd.gradcheck(of_logits, logprobs[0].clone().requires_grad_())


@pytest.mark.parametrize("loss", [losses.GRPOLoss(), losses.GSPOLoss(), losses.DAPOLoss(kl_coef=0.1)])
def test_any_loss_adds_it_per_token(loss):
    generator = torch.Generator().manual_seed(1)
    old, start, distance = (torch.randn(4, 5, generator=generator) for _ in range(3))
    mask = torch.rand(4, 5, generator=generator) < 0.7
    options = {"old_logprobs": old, "ref_logprobs": start, "num_tokens": 30.0, "num_sequences": 7.0}
    plain = LossInputs((old + 0.1).requires_grad_(), torch.randn(4, generator=generator), mask, **options)
    with_it = LossInputs(**{**vars(plain), "divergence": distance.masked_fill(~mask, torch.nan).requires_grad_()})
    added = loss(with_it).loss - loss(plain).loss
    rows, of_tokens = mask.sum(1).clamp(min=1), (distance * mask).sum(1)
    wanted = of_tokens.sum() / 30 if isinstance(loss, losses.DAPOLoss) else (of_tokens / rows).sum() / 7
    torch.testing.assert_close(added, wanted)
    (gradient,) = torch.autograd.grad(loss(with_it).loss, with_it.divergence)
    assert (gradient[mask] > 0).all() and not gradient[~mask].any()


def test_impossible_values_are_refused():
    for make, message in (
        (lambda: losses.SampledReverseKL(coef=0), "coef=0 must be finite and above 0; leave model.teacher out"),
        (lambda: losses.ForwardKL(top_k=-1), "top_k=-1 is not a number of tokens"),
        (lambda: losses.JensenShannon(beta=1), "use ForwardKL for 0 and ReverseKL for 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
