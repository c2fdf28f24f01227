"""What a loss sees of an optimizer step: tokens that are masked, denominators, and entropies, however the step is split."""

from dataclasses import replace

import pytest
import torch
from test_update import assert_same_gradients, run
from tiny_runs import OftenDone, build_adapter, fit

from hybrid_lightning.adapters.scorers import Random
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import BNPOLoss, DAPOLoss, GRPOLoss, TopEntropyMask
from hybrid_lightning.policy.token_weights import mask_tokens
from hybrid_lightning.rollout.rollout_engine import Stops
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.types import PolicyBatch, Sequences


class NeverDone(Sampler):
    """No token ends a completion."""

    def sample(self, *args, **options):
        return super().sample(*args, **{**options, "stops": Stops((10_000,), None)})


def test_splitting_a_step_changes_nothing(model, sums, tmp_path):
    loss = DAPOLoss(entropy_coef=0.02)
    masks = {"token_mask": TopEntropyMask(0.5), "mask_truncated_completions": True}
    policy = {"loss": loss, "sampler": OftenDone(4), **masks}
    whole, weights = run(model, sums, tmp_path, policy, max_steps=2)
    split, same = run(model, sums, tmp_path, {**policy, "max_tokens_per_micro_batch": 12}, accumulate_grad_batches=2, max_steps=2)
    assert max(split.passes) > 1 and len(split.passes) == 4
    assert_same_gradients(split.gradients, whole.gradients)
    torch.testing.assert_close(same, weights, atol=1e-6, rtol=0)
    for one, other in zip(split.metrics[1::2], whole.metrics, strict=True):
        assert {**one, "loss": 0} == pytest.approx({**other, "loss": 0}, abs=1e-4, rel=1e-4)
    # Sequences without advantage are there for the entropy bonus.
    assert all(0 < step["top_entropy/share"] < 1 for step in whole.metrics)


def test_what_bnpo_takes_for_a_micro_batch_is_not_cut_by_the_token_budget(model, sums, tmp_path):
    policy = {"loss": BNPOLoss(), "sampler": Sampler(10)}
    whole, split = (
        run(model, sums, tmp_path, {**policy, "max_tokens_per_micro_batch": budget}, max_steps=1, accumulate_grad_batches=2)[0]
        for budget in (10_000, 12)
    )
    assert whole.rows == split.rows == [4, 4] and max(whole.passes) == 1 < max(split.passes)
    assert_same_gradients(split.gradients, whole.gradients)


def test_truncated_completions_are_left_out_and_count_as_sequences_alone(model, sums, tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr(
        "hybrid_lightning.policy.module.PolicyModule.add_logprobs",
        lambda self, parts, on_policy: batches.append((self.last_rollout[0], parts)) or list(parts),
    )
    policy = {"loss": GRPOLoss(), "sampler": OftenDone(3), "mask_truncated_completions": True, "minibatches_per_rollout": 1}
    run(model, sums, tmp_path, policy, max_steps=1)
    (rollouts, (batch,)) = batches[0]
    tokens = rollouts.sequences.completion_mask.sum(dim=1)
    assert 0 < rollouts.finished.sum() < len(rollouts.finished) == 16
    assert (batch.num_sequences, batch.num_tokens) == (16.0, float(tokens[rollouts.finished].sum()))
    assert 0 < len(batch.sequences) <= rollouts.finished.sum()
    assert batch.updated_tokens == float(batch.sequences.completion_mask.sum()) <= batch.num_tokens


def test_one_threshold_serves_all_micro_batches_and_looks_at_taught_sequences_alone():
    def batch(advantages):
        mask = torch.ones(len(advantages), 2, dtype=torch.bool)
        ids = torch.zeros_like(mask, dtype=torch.long)
        rows = Sequences(ids, mask, ids, mask)
        return PolicyBatch(rows, torch.tensor(advantages), ids.float(), None, None, 4.0, 8.0, 4.0, 8.0)

    entropies = [torch.tensor([[0.1, 0.9], [5.0, 5.0]]), torch.tensor([[0.2, 0.3]])]
    masked = mask_tokens([batch([1.0, 0.0]), batch([-1.0])], entropies, TopEntropyMask(0.5))
    assert [part.policy_mask.tolist() for part in masked] == [[[False, True], [True, True]], [[False, True]]]
    assert masked[0].loss_inputs(torch.zeros(2, 2)).importance_weights.tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert masked[0].rows(slice(1, 2)).policy_mask.tolist() == [[True, True]]
    (nothing,) = mask_tokens([replace(batch([]), advantages=torch.zeros(0))], [torch.zeros(0, 2)], TopEntropyMask(0.5))
    assert nothing.policy_mask.shape == (0, 2)


def test_where_every_completion_is_cut_and_masked_the_run_ends_before_it_begins(model, sums, tmp_path):
    policy = {"sampler": NeverDone(2), "mask_truncated_completions": True}
    with pytest.raises(ConfigError, match=r"all 16 calibration completions were cut at max_new_tokens=2.*; raise model.sampler"):
        run(model, sums, tmp_path, policy, max_steps=1)


def test_where_the_plan_is_given_it_says_so(model, sums, tmp_path):
    policy = {"sampler": NeverDone(2), "mask_truncated_completions": True}
    with pytest.warns(UserWarning, match=r"all 16 completions of a rollout were cut at max_new_tokens=2.*nothing is learned"):
        fit(model, sums, tmp_path, build_adapter(scorer=Random(seed=0)), policy=policy, max_steps=1)  # which needs no rollouts
