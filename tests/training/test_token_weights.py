"""Weights of tokens: sampling and training log-probabilities under the same weights, measured and corrected for; and masks."""

from dataclasses import replace

import pytest
import torch

from hybrid_lightning.losses import GSPOLoss, SequenceMask, TokenTruncation, TopEntropyMask, combine_metrics
from hybrid_lightning.losses import functional as F
from hybrid_lightning.training.token_weights import compare_with_sampler, mask_tokens, sampling_metrics
from hybrid_lightning.types import PolicyBatch, Sequences

MEAN, MAX = "sampling/logp_difference/mean", "sampling/logp_difference/max"
WEIGHT = "sampling/importance_weight"


def make_batch(lengths, on_policy=False):
    generator = torch.Generator().manual_seed(2)
    real = torch.arange(6)[None] < torch.tensor(lengths)[:, None] + (torch.tensor(lengths)[:, None] > 1)
    mask = real & (torch.arange(6) != 1)  # an environment added the second token
    trained, sampled = (-torch.rand(len(lengths), 6, generator=generator) for _ in range(2))
    ids = torch.zeros_like(mask, dtype=torch.long)
    sequences = Sequences(ids, torch.ones_like(mask), ids, real, sampled_mask=mask)
    advantages = torch.randn(len(lengths), generator=generator)
    old, counts = None if on_policy else torch.where(mask, trained, torch.inf), [float(len(lengths)), float(sum(lengths))] * 2
    return PolicyBatch(sequences, advantages, torch.where(mask, sampled, torch.nan), old, None, *counts), trained


def compare(batch, logprobs, correction):
    """The inputs of the loss, and the metrics."""
    difference, weights = compare_with_sampler(batch, logprobs, correction)
    inputs = batch.loss_inputs(logprobs, F.per_token(weights, batch.sequences.sampled_mask))
    return inputs, sampling_metrics(difference, weights, inputs)


@pytest.mark.parametrize("correction", [TokenTruncation(cap=1.2), SequenceMask(cap=1.5)], ids=["token", "sequence"])
def test_shares_of_micro_batches_make_the_step(correction):
    batch, _ = make_batch([5, 2, 0, 3, 4, 1])
    _, together = compare(batch, torch.zeros(6, 6), correction)
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part = batch.rows(rows)
        parts.append(compare(part, torch.zeros_like(part.sampling_logprobs), correction)[1])
    joined = combine_metrics(parts)
    rows = [(batch.old_logprobs - batch.sampling_logprobs)[row][batch.sequences.sampled_mask[row]] for row in range(6)]
    assert float(together[MEAN]) == pytest.approx(float(torch.cat(rows).abs().mean()), rel=1e-6)
    assert float(together[MAX]) == pytest.approx(float(torch.cat(rows).abs().max()), rel=1e-6)
    assert set(joined) == set(together) == {MEAN, MAX, *(f"{WEIGHT}/{name}" for name in ("mean", "min", "max"))}
    for name, value in together.items():
        torch.testing.assert_close(joined[name], value, msg=name)
    assert together[f"{WEIGHT}/min"] < together[f"{WEIGHT}/mean"] < together[f"{WEIGHT}/max"]


@pytest.mark.parametrize(("correction", "mean"), [(TokenTruncation(), 0.0), (SequenceMask(), 1.0)])
def test_no_token_at_all_is_neither_far_nor_near(correction, mean):
    """The mean weight is that over no token, or over the sequences."""
    inputs, metrics = compare(make_batch([0, 0])[0], torch.zeros(2, 6, requires_grad=True), correction)
    expected = {MEAN: 0.0, MAX: 0.0, f"{WEIGHT}/mean": mean, f"{WEIGHT}/min": 1.0, f"{WEIGHT}/max": 0.0}
    assert {name: float(value) for name, value in metrics.items()} == expected
    GSPOLoss()(inputs).loss.backward()


def test_on_policy_the_current_logprobs_are_those_that_sampled():
    on_policy, logprobs = make_batch([5, 2, 3], on_policy=True)
    old, _ = make_batch([5, 2, 3])
    leaf = logprobs.clone().requires_grad_()
    (inputs, metrics), (of_old, expected) = (compare(b, leaf, TokenTruncation()) for b in (on_policy, old))
    mask = on_policy.sequences.sampled_mask
    assert metrics == expected and torch.equal(inputs.importance_weights[mask], of_old.importance_weights[mask])
    assert inputs.old_logprobs is None and not inputs.importance_weights.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_one_threshold_serves_all_micro_batches_and_looks_at_trained_sequences_alone():
    def batch(*advantages):
        return replace(make_batch([2] * len(advantages))[0], advantages=torch.tensor(advantages)).rows(slice(None))

    # The second token of each was added, whatever its entropy is.
    entropies = [torch.tensor([[0.1, 9.0, 0.9], [5.0, 0.0, 5.0]]), torch.tensor([[0.2, 0.0, 0.3]])]
    masked = mask_tokens([batch(1.0, 0.0), batch(-1.0)], entropies, TopEntropyMask(0.5))
    of_rows = [[False, False, True], [True, False, True]], [[False, False, True]]
    assert tuple(part.policy_mask.tolist() for part in masked) == of_rows
    assert masked[0].loss_inputs(torch.zeros(2, 3)).importance_weights.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    assert masked[0].rows(slice(1, 2)).policy_mask.tolist() == [[True, False, True]]
    (nothing,) = mask_tokens([masked[1].rows(slice(0, 0))], [torch.zeros(0, 1)], TopEntropyMask(0.5))
    assert nothing.policy_mask.shape == (0, 1)
