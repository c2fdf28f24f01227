"""Divergences and gradients against TRL's own: of GKD, of its chunked kernel, of SDFT's top-k and sampled tokens."""

import pytest
import torch

from hybrid_lightning import losses
from hybrid_lightning.losses import functional as F
from hybrid_lightning.types import LossInputs

pytest.importorskip("trl", reason="parity needs trl: pip install 'hybrid-lightning[test]'")
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.sdft import loss_utils
from trl.trainer.distillation_trainer import _chunked_divergence_loss

B, T, V, H = 3, 4, 7, 5
# TRL's beta or alpha, and the divergence that it stands for.
CASES = [(0.0, losses.ForwardKL()), (1.0, losses.ReverseKL()), (0.2, losses.JensenShannon(beta=0.2))]


def draw(*shape, seed, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def mask():
    return torch.arange(T)[None] < torch.tensor([4, 2, 3])[:, None]


def ours(divergence, student, teacher, temperature=1.0):
    """Our divergence of logits [K, V]."""
    return divergence((student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1))


@pytest.mark.parametrize(("beta", "divergence"), CASES)
def test_values_and_gradients_of_gkd_and_of_the_chunked_kernel(beta, divergence, mask):
    hidden, of_teacher = draw(B, T, H, seed=3, dtype=torch.float32).requires_grad_(), draw(B, T, H, seed=4, dtype=torch.float32)
    heads = [draw(V, H, seed=seed, dtype=torch.float32) for seed in (5, 6)]
    student, teacher = hidden @ heads[0].T, of_teacher @ heads[1].T
    mean = ours(divergence, student[mask], teacher[mask], 0.7).mean()  # theirs are over the tokens, too
    labels = torch.where(mask, 1, -100)
    gkd = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=0.7)
    chunked, *_ = _chunked_divergence_loss(hidden, of_teacher, *heads, mask, beta, temperature=0.7)
    gradient = torch.autograd.grad(mean, hidden, retain_graph=True)[0]
    for theirs in (gkd, chunked):
        torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs, hidden)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_top_k_and_the_rest(alpha):
    divergence = losses.ReverseKL(top_k=3) if alpha == 1 else losses.JensenShannon(top_k=3)
    student, teacher = draw(B * T, V, seed=7).requires_grad_(), draw(B * T, V, seed=8)
    options = {"distillation_topk": 3, "distillation_alpha": alpha, "distillation_add_tail": True}
    theirs = loss_utils.compute_topk_self_distillation_loss(student, teacher, **options)
    torch.testing.assert_close(ours(divergence, student, teacher), theirs, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_sampled_tokens(mask):
    student, teacher = draw(B, T, V, seed=9).requires_grad_(), draw(B, T, V, seed=10)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    theirs = loss_utils.compute_sampled_token_self_distillation_loss(student, teacher, ids, distillation_alpha=1.0)
    logprobs, of_teacher = (logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2) for logits in (student, teacher))
    advantages = F.log_ratio(of_teacher, logprobs.detach(), mask)
    loss = losses.DAPOLoss()(LossInputs(logprobs, advantages, mask)).loss
    wanted = (theirs * mask).sum() / mask.sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, wanted)), rtol=1e-9, atol=1e-12)
