"""How a step is split, and which rows are left out, never changes the update; and what is logged with it."""

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from rounding import additions_of, assert_same_sums
from tiny_models import build_model
from tiny_runs import Constant, Log, OftenDone, Talk, build_adapter, build_data, build_policy, build_trainer, fit, trained

from hybrid_lightning.adapters import Random, TailEnergy
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.errors import ConfigError, TrainingError
from hybrid_lightning.losses import DAPOLoss, GRPOLoss, GSPOLoss, TopEntropyMask
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import Stops


def assert_same_gradients(found, expected):
    """Of each step, of at most 16 sequences of 12 tokens; theirs are around 0.05, and may nearly cancel."""
    additions = additions_of(build_model("llama"), 16 * 12, backward=True)
    for step, other in zip(found, expected, strict=True):
        assert_same_sums(step, other, additions, size=0.05)


class Watch(Log):
    """And forward passes of each micro-batch."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.passes.append(0)
        self.handle = pl_module.model.get_base_model().model.register_forward_hook(self.count)

    def count(self, *_):
        self.passes[-1] += 1

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.handle.remove()
        super().on_train_batch_end(trainer, pl_module, *arguments)
        known = pl_module.task.training_metrics | {"val"}
        assert {name.partition("/")[0] for name in self.metrics[-1]} <= known, "the names of a policy's metrics are known before"


def run(model, sums, root, policy=None, **flags):
    watch = Watch()
    arguments = {"optimizer": torch.optim.SGD, "lr_full": 0.05, "lr_lora": 0.1, "minibatches_per_rollout": 2, **(policy or {})}
    module = fit(model, sums, root, watch, policy=arguments, **flags)
    return watch, trained(module)


SHORT = {"max_tokens_per_micro_batch": 12}
MASKS = {"token_mask": TopEntropyMask(0.5), "mask_truncated_completions": True, "sampler": OftenDone(4)}
# A policy; micro-batches of a step, and of one that is split further; and options of the latter.
SPLITS = {
    "grpo": ({"loss": GRPOLoss(kl_coef=0.1)}, 2, 2, {**SHORT, "gradient_checkpointing": True}),
    "gspo": ({"loss": GSPOLoss(kl_coef=0.05)}, 1, 8, {}),
    "dapo": ({"loss": DAPOLoss(entropy_coef=0.02), **MASKS}, 1, 2, SHORT),  # with sequences without advantage for the bonus
}


@pytest.mark.parametrize(("policy", "accumulate", "of_split", "options"), SPLITS.values(), ids=SPLITS)
def test_how_a_step_is_split_changes_nothing_but_the_forward_passes(model, sums, tmp_path, policy, accumulate, of_split, options):
    whole, weights = run(model, sums, tmp_path, policy, accumulate_grad_batches=accumulate)
    split, same = run(model, sums, tmp_path, {**policy, **options}, accumulate_grad_batches=of_split)
    assert max(whole.passes) == 1 and len(split.passes) == 2 * of_split and sum(split.passes) > 2 * sum(whole.passes)
    steps, others = whole.metrics[accumulate - 1 :: accumulate], split.metrics[of_split - 1 :: of_split]
    for step, other in zip(steps, others, strict=True):
        assert step == pytest.approx(other, abs=1e-4, rel=1e-4)
        assert step["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert 0 < step.get("top_entropy/share", 0.5) < 1
    assert_same_gradients(split.gradients, whole.gradients)
    assert sum(gradient.any() for gradient in whole.gradients[-1].values()) > 10
    torch.testing.assert_close(same, weights, atol=1e-6, rtol=0)


class NeverDone(Sampler):
    """No token ends a completion."""

    def stops(self, tokenizer, ids=None, more=()):
        return Stops((10_000,), None)


def test_where_every_completion_is_cut_and_masked_it_ends_before_it_begins_or_says_so(model, sums, tmp_path):
    policy = {"sampler": NeverDone(2), "mask_truncated_completions": True}
    masked = r"at max_new_tokens=2, and model.mask_.* nothing is learned .*; raise model.sampler.max_new_tokens, or set model"
    with pytest.raises(ConfigError, match=rf"all 16 completions of the calibration were cut {masked}"):
        fit(model, sums, tmp_path, build_adapter(scorer=TailEnergy()), policy=policy, max_steps=1)
    with pytest.warns(UserWarning, match=rf"all 16 completions of a rollout were cut {masked}"):
        fit(model, sums, tmp_path, build_adapter(scorer=Random()), policy=policy, max_steps=1)  # which needs no rollouts
    policy |= {"environment": Talk(), "episodes": EpisodeLimits(max_tokens=30), "reward": None, "turn_template": "{content}"}
    masked = r"at max_new_tokens=2 of a message or episodes.max_tokens=30 of an .*; raise .*_new_tokens and model.episodes.max"
    with pytest.raises(ConfigError, match=rf"all 16 episodes of the calibration were cut {masked}"):
        fit(model, sums, tmp_path, build_adapter(scorer=TailEnergy()), policy=policy, max_steps=1)


class NanOnceOffPolicy(GRPOLoss):
    def policy_term(self, inputs, old_logprobs):
        term, ratio = super().policy_term(inputs, old_logprobs)
        return term * (math.nan if (ratio != 1).any() else 1.0), ratio


def test_a_gradient_that_is_not_finite_stops_before_the_step(model, sums, tmp_path):
    """The weights would be nan, and the next rollout fail on that."""
    policy = build_policy(model, loss=NanOnceOffPolicy(), minibatches_per_rollout=2)
    trainer = build_trainer(tmp_path, build_adapter(scorer=Random()))
    with pytest.raises(TrainingError, match=r"gradient of step 2 is nan \(grad_norm/\w+\), so no step was made"):
        trainer.fit(policy, datamodule=build_data(sums))
    assert trainer.global_step == 1 and all(p.isfinite().all() for p in policy.parameters())


def test_a_step_without_any_advantage_has_a_gradient_of_zero_and_logs_what_others_do(model, sums, tmp_path):
    watch, other = Watch(), Watch()
    fit(model, sums, tmp_path, watch, policy={"reward": Constant()}, max_steps=2)
    fit(model, sums, tmp_path, other, max_steps=1)
    assert watch.losses == [0, 0]
    assert [len(batch.sequences) for batch in watch.batches] == [4, 4], "a completion of each prompt is measured"
    assert all(not gradient.any() for step in watch.gradients for gradient in step.values()) and len(watch.gradients[0]) > 10
    assert watch.metrics[0]["ratio/mean"] == 1 and watch.metrics[0]["frac_reward_zero_std"] == 1
    constant, usual = ({name for name in log.metrics[0] if not name.startswith("rewards/")} for log in (watch, other))
    assert constant == usual and watch.metrics[0]["entropy"] > 0


def test_a_logger_has_the_metrics_of_the_rollout_at_every_step(model, sums, tmp_path):
    """They are logged once a rollout, and again where an epoch has ended within it."""
    rewards, logger = [], CSVLogger(tmp_path, "log", version=0)
    mean = lambda batch: float(batch.rollout.rewards.total.mean())  # noqa: E731
    seen = LambdaCallback(on_train_batch_end=lambda _, policy, outputs, batch, *of: rewards.append(mean(batch)))
    flags = {"max_steps": 6, "logger": logger, "log_every_n_steps": 1, "limit_train_batches": 3}
    fit(model, sums, tmp_path, seen, policy={"minibatches_per_rollout": 2}, **flags)
    rows = csv.DictReader((tmp_path / "log/version_0/metrics.csv").open())
    assert [float(row["reward"]) for row in rows if row["reward"]] == pytest.approx(rewards) and len(rewards) == 6
