"""Runs with losses of each aggregation: each optimizer step's gradient from the equation, token by token in its full context.

With masks, computed once more here, over two passes of two minibatches of two micro-batches. A sequence is an episode of one row
or two. `tests/losses` and `tests/test_advantages.py` show the equations of the other losses and of advantages.
"""

import os
import traceback

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import build_model, plain_distribution, tokens_of
from tiny_runs import Failing, Interrupted, Rewritten, StartsWithDigit, fit

from hybrid_lightning import losses
from hybrid_lightning.advantages import BatchStdAdvantage, GroupAdvantage, GroupMeanAdvantage, PerRewardAdvantage
from hybrid_lightning.rewards import RewardFunction, WeightedSum
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.sampler import _Decoder

LONGEST, MINIBATCHES, MICRO_BATCHES = 6, 2, 2
ENTROPY, KL, TEMPERATURE = 0.05, 0.05, 0.9


class Brevity(RewardFunction):
    """A second reward, of another spread."""

    measures_correctness = False

    def __call__(self, completions, prompts):
        return [0.1 * (LONGEST - completion.num_tokens) for completion in completions]


# ---- terms of a token's loss from new and old log-probabilities [t] and the advantage


def clipped(ratio, advantage, low, high):
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def of_tokens(low, high):
    return lambda new, old, advantage: clipped((new - old).exp(), advantage, low, high)


def gspo(new, old, advantage):
    """The loss of the row, for each of its tokens."""
    return clipped((new - old).mean().exp(), advantage, 3e-4, 4e-4).expand_as(new)


def gspo_token(new, old, advantage):
    return clipped((new - old).mean().exp().detach() * (new - new.detach()).exp(), advantage, 0.08, 0.09)


def cispo(new, old, advantage):
    return -(new - old).exp().detach().clamp(max=1.1) * advantage * new


# ---- weight of each episode's tokens, from how many tokens the episodes of the optimizer step have, [E]


def mean_of_means(lengths):
    return 1 / (len(lengths) * lengths.clamp(min=1))


def mean_over_tokens(lengths):
    return torch.ones(len(lengths)) / lengths.sum()


def mean_over_positions(lengths):
    return torch.full((len(lengths),), 1 / (len(lengths) * LONGEST))


def mean_of_micro_batches(lengths):
    return torch.cat([torch.ones(len(half)) / half.sum() / MICRO_BATCHES for half in lengths.chunk(MICRO_BATCHES)])


MASKED, TOP = {"mask_truncated_completions": True}, {"token_mask": losses.TopEntropyMask(0.5)}
# Weights of tokens from how much more probable they were to the policy than to the sampler.
CORRECTED = {
    losses.TokenTruncation: lambda log: log.exp().clamp(max=1.02),
    losses.TokenMask: lambda log: log.exp() * ((log.exp() < 1.05) & (log.exp() > 0.95)),
    losses.SequenceTruncation: lambda log: log.sum().exp().clamp(max=1.02).expand_as(log),
    losses.SequenceMask: lambda log: (log.sum().exp() * (log.sum().exp() < 1.1)).expand_as(log),
}


def stale(correction=None):
    return {"rollouts_ahead": 1, "correction": correction}


TRUNCATED, TOKENS = MASKED | stale(losses.TokenTruncation(1.02)), MASKED | stale(losses.TokenMask(1.05, 0.95))
CASES = [
    (losses.GRPOLoss(kl_coef=KL), of_tokens(0.2, 0.2), mean_of_means, GroupAdvantage(), {}),
    (losses.GSPOLoss(kl_coef=KL), gspo, mean_of_means, PerRewardAdvantage(), stale()),
    (losses.GSPOTokenLoss(0.08, 0.09, kl_coef=KL), gspo_token, mean_of_means, GroupAdvantage(), TOP),
    (losses.DAPOLoss(entropy_coef=ENTROPY), of_tokens(0.2, 0.28), mean_over_tokens, GroupAdvantage(), TRUNCATED),
    (losses.DrGRPOLoss(), of_tokens(0.2, 0.2), mean_over_positions, GroupMeanAdvantage(), TOKENS),
    (losses.BNPOLoss(), of_tokens(0.2, 0.2), mean_of_micro_batches, BatchStdAdvantage(), stale(losses.SequenceMask(1.1))),
    (losses.CISPOLoss(1.1), cispo, mean_over_tokens, BatchStdAdvantage(), TOP | MASKED | stale(losses.SequenceTruncation(1.02))),
]


def completion(model, sequences, row):
    """Log-probabilities and entropies of what was sampled of one completion, [t] each."""
    distribution = plain_distribution(model, sequences, row, TEMPERATURE)
    chosen = torch.tensor(tokens_of(sequences, row)[1])[:, None]
    sampled = sequences.sampled_mask[row, : len(chosen)]
    return distribution.gather(1, chosen).squeeze(1)[sampled], -(distribution.exp() * distribution).sum(-1)[sampled]


class ByEquation(Callback):
    def __init__(self, loss, term, weights, advantage, options):
        self.loss, self.term, self.weights, self.advantage, self.options = loss, term, weights, advantage, options
        self.base = build_model("llama", std=0.1)
        self.rollout, self.minibatch, self.steps, self.several, self.ratios = None, 0, 0, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert batch.loss_inputs(batch.sampling_logprobs).sampling_logprobs is batch.sampling_logprobs
        if batch.rollout is not self.rollout:
            self.rollout, self.minibatch = batch.rollout, 0
            with torch.no_grad():
                sequences = self.rollout.sequences
                self.old = [completion(pl_module.model, sequences, row) for row in range(len(sequences))]
                self.start = [completion(self.base, sequences, row)[0] for row in range(len(sequences))]
                self.importance = [torch.ones_like(old) for old, _ in self.old]
                sampling = zip(self.rollout.sampling_logprobs, sequences.sampled_mask, strict=True)
                # The policy before the rollout's first step is not the one that sampled: weighed, or the ratio is to the latter.
                if "rollouts_ahead" in self.options and self.options["correction"] is None:
                    self.old = [(own[mask], entropy) for (own, mask), (_, entropy) in zip(sampling, self.old, strict=True)]
                elif "rollouts_ahead" in self.options:
                    weigh = CORRECTED[type(self.options["correction"])]
                    self.importance = [weigh(old - own[mask]) for (own, mask), (old, _) in zip(sampling, self.old, strict=True)]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        rollout, first = self.rollout, self.minibatch % MINIBATCHES * 8
        self.minibatch += 1
        counted = rollout.rewards.counted.flatten()
        episodes = [episode for episode in range(first, first + 8) if counted[episode]]
        found = self.advantage.of_rewards(rollout.rewards).flatten()
        assert not rollout.advantages.flatten()[~counted].any()
        kept = rollout.finished.flatten() if "mask_truncated_completions" in self.options else torch.ones(16, dtype=torch.bool)
        rows = {episode: (rollout.episode_of_row == episode).nonzero().flatten().tolist() for episode in episodes}
        self.several += sum(len(of_episode) > 1 for of_episode in rows.values())
        lengths = torch.tensor([sum(len(self.old[row][0]) for row in rows[e]) * int(kept[e]) for e in episodes])
        taught = [episode for episode in episodes if kept[episode] and abs(found[episode]) > 1e-5]
        teaching = [self.old[row][1] for episode in taught for row in rows[episode]]
        share = self.options["token_mask"].share if "token_mask" in self.options else 1.0
        threshold = torch.quantile(torch.cat(teaching), 1 - share) - 1e-6 if teaching else torch.tensor(torch.inf)
        total, entropies = torch.zeros(()), []
        for episode, weight in zip(episodes, self.weights(lengths), strict=True):
            for row in rows[episode] * int(kept[episode]):
                new, entropy = completion(pl_module.model, rollout.sequences, row)
                old, old_entropy = self.old[row]
                self.ratios += (new - old).exp().tolist()
                chosen = old_entropy >= threshold if share < 1 else torch.ones_like(old, dtype=torch.bool)
                total = total + weight * (self.term(new, old, found[episode]) * chosen * self.importance[row]).sum()
                ahead = self.start[row] - new
                total = total + self.loss.kl_coef * weight * (ahead.exp() - ahead - 1).sum()
                total = total - self.loss.entropy_coef * entropy.sum() / lengths.sum()
                entropies.append(entropy.detach())
        if len(taught) == len(episodes):
            assert float(trainer.callback_metrics["entropy"]) == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
        trained = [parameter for parameter in pl_module.model.parameters() if parameter.requires_grad]
        wanted = torch.autograd.grad(total, trained)
        scale = max(float(gradient.abs().max()) for gradient in wanted)
        for parameter, gradient in zip(trained, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * scale, rtol=0)
        torch.testing.assert_close(trainer.callback_metrics["loss"], total.detach(), atol=2e-5, rtol=1e-4)
        self.steps += scale > 1e-3


@pytest.mark.parametrize("kind", [Failing, Rewritten])
@pytest.mark.parametrize(
    ("loss", "term", "weights", "advantage", "options"), CASES, ids=[type(case[0]).__name__ for case in CASES]
)
def test_gradients_follow_the_equation(model, sums, tmp_path, loss, term, weights, advantage, options, kind):
    by_equation = ByEquation(loss, term, weights, advantage, options)
    reward = WeightedSum([StartsWithDigit(), Brevity()], [1.0, 0.5])
    policy = {"loss": loss, "advantage": advantage, "reward": reward, "kind": kind, **options}
    policy |= {"minibatches_per_rollout": MINIBATCHES, "epochs_per_rollout": 2, "max_tokens_per_micro_batch": 24}
    policy["sampler"] = Interrupted(LONGEST, temperature=TEMPERATURE)
    fit(model, sums, tmp_path, by_equation, policy=policy, max_steps=6, accumulate_grad_batches=MICRO_BATCHES)
    assert by_equation.steps >= 4, "of six; the last two belong to a second rollout, and all may be clipped in some"
    assert bool(by_equation.several) == (kind is Rewritten)
    assert min(by_equation.ratios) < 0.95 and max(by_equation.ratios) > 1.05, "two passes over a rollout are off-policy"


def test_few_calls_lie_between_the_loader_and_the_decoding_of_a_plain_rollout(model, sums, tmp_path, monkeypatch):
    """Of this package, and the engine's own call is one of them."""
    decode, ways = _Decoder.decode, []

    def decoded(decoder, *given):
        frames = [frame for frame in traceback.extract_stack() if f"{os.sep}hybrid_lightning{os.sep}" in frame.filename]
        (begin,) = (place for place, frame in enumerate(frames) if frame.name == "__iter__" and "loader" in frame.filename)
        ways.append([frame.name for frame in frames[begin + 1 :]])
        return decode(decoder, *given)

    monkeypatch.setattr(_Decoder, "decode", decoded)
    fit(model, sums, tmp_path, policy={"sampler": Sampler(6)}, max_steps=1)
    assert ways and all(len(way) <= 10 for way in ways), ways
