"""How a step is split, and which rows are left out, never changes the update; and what is logged with it."""

import csv
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from rounding import additions_of, assert_same_sums
from tiny_examples import fit as fit_examples
from tiny_examples import write_rows
from tiny_models import build_model
from tiny_runs import (
    Constant,
    Log,
    StartsWithDigit,
    build_adapter,
    build_data,
    build_policy,
    build_trainer,
    fit,
    trained,
)

from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.errors import TrainingError
from hybrid_lightning.losses import CISPOLoss, GRPOLoss, GSPOLoss, SAPOLoss, TokenTruncation, TopEntropyMask
from hybrid_lightning.policy import update
from hybrid_lightning.policy.adaptation import CHECKPOINT_KEY
from hybrid_lightning.policy.update import StepMetrics
from hybrid_lightning.rollout.batching import pad_left, pad_right, split_by_tokens
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
from hybrid_lightning.types import Sequences


def assert_same_gradients(found, expected):
    """Of each step, of at most 16 sequences of 12 tokens; theirs are around 0.05, and may nearly cancel."""
    additions = additions_of(build_model("llama"), 16 * 12, backward=True)
    for step, other in zip(found, expected, strict=True):
        assert_same_sums(step, other, additions, size=0.05)


class Watch(Log):
    """And rows and forward passes of each micro-batch."""

    def __init__(self):
        super().__init__()
        self.rows, self.passes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(len(batch.sequences))
        self.passes.append(0)
        decoder = pl_module.model.get_base_model().model
        self.handle = decoder.register_forward_hook(self.count)

    def count(self, *_):
        self.passes[-1] += 1

    def on_train_batch_end(self, *arguments):
        self.handle.remove()
        super().on_train_batch_end(*arguments)


class AllRows(GRPOLoss):
    ignores_zero_advantage = False


def run(model, sums, root, policy=None, **flags):
    watch = Watch()
    arguments = {"optimizer": torch.optim.SGD, "lr_full": 0.05, "lr_lora": 0.1, "minibatches_per_rollout": 2, **(policy or {})}
    module = fit(model, sums, root, watch, policy=arguments, **{"max_steps": 4, **flags})
    return watch, trained(module)


@pytest.mark.parametrize(
    ("loss", "accumulate", "checkpointing"),
    [(GRPOLoss(kl_coef=0.1), 2, True), (GSPOLoss(), 1, False)],
    ids=["grpo-kl-2-checkpointing", "gspo-1"],
)
def test_a_token_budget_changes_nothing_but_the_forward_passes(model, sums, tmp_path, loss, accumulate, checkpointing):
    policy = {"loss": loss, "gradient_checkpointing": checkpointing}
    whole, weights = run(model, sums, tmp_path, policy, accumulate_grad_batches=accumulate)
    policy["max_tokens_per_micro_batch"] = 12
    split, same = run(model, sums, tmp_path, policy, accumulate_grad_batches=accumulate)
    assert max(whole.passes) == 1 and max(split.passes) > 2
    assert split.losses == pytest.approx(whole.losses, abs=2e-6)
    for one, other in zip(split.metrics, whole.metrics, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-4)
    assert_same_gradients(split.gradients, whole.gradients)
    torch.testing.assert_close(same, weights, atol=1e-6, rtol=0)


class NanOnceOffPolicy(GRPOLoss):
    def policy_term(self, inputs, old_logprobs):
        term, ratio = super().policy_term(inputs, old_logprobs)
        return term * (math.nan if (ratio != 1).any() else 1.0), ratio


def test_a_gradient_that_is_not_finite_stops_before_the_step(model, sums, tmp_path):
    """The weights would be nan, and the next rollout fail on that."""
    watch = Watch()
    arguments = {"loss": NanOnceOffPolicy(), "minibatches_per_rollout": 2}
    policy, trainer = build_policy(model, **arguments), build_trainer(tmp_path, build_adapter(), watch, max_steps=4)
    with pytest.raises(TrainingError, match=r"gradient of step 2 is nan \(grad_norm/\w+\), so no step was made"):
        trainer.fit(policy, datamodule=build_data(sums))
    assert trainer.global_step == 1 and all(p.isfinite().all() for p in policy.parameters())


def test_on_policy_ratios_are_exactly_one_however_rows_are_split(model, sums, tmp_path):
    policy = {"epochs_per_rollout": 2, "minibatches_per_rollout": 1, "max_tokens_per_micro_batch": 12}
    watch, _ = run(model, sums, tmp_path, policy, max_steps=3)
    assert [step["ratio/max"] for step in watch.metrics[::2]] == [1.0, 1.0]
    assert watch.metrics[1]["ratio/max"] > 1


def test_rows_without_advantage_are_left_out_and_are_not_missed(model, sums, tmp_path):
    flags = {"accumulate_grad_batches": 2, "max_steps": 6}
    every, weights = run(model, sums, tmp_path, {"loss": AllRows(), "reward": StartsWithDigit()}, **flags)
    some, same = run(model, sums, tmp_path, {"loss": GRPOLoss(), "reward": StartsWithDigit()}, **flags)
    assert sum(some.rows) < sum(every.rows) == 6 * 8
    assert_same_gradients(some.gradients, every.gradients)
    torch.testing.assert_close(same, weights, atol=1e-6, rtol=0)
    steps = [[sum(watch.losses[i : i + 2]) for i in range(0, len(watch.losses), 2)] for watch in (some, every)]
    assert steps[0] == pytest.approx(steps[1], abs=1e-6)
    assert some.metrics[1]["ratio/mean"] == pytest.approx(1, abs=1e-5), "means are over the rows that are there"
    reference, _ = run(model, sums, tmp_path, {"loss": GRPOLoss(kl_coef=0.01), "reward": StartsWithDigit()}, max_steps=2)
    assert set(reference.rows) == {8}, "the reference needs every row"


def test_a_step_without_any_advantage_has_a_gradient_of_zero(model, sums, tmp_path):
    watch = Watch()
    fit(model, sums, tmp_path, watch, policy={"reward": Constant()}, max_steps=2)
    assert watch.rows == [0, 0] and watch.passes == [0, 0] and watch.losses == [0, 0]
    assert all(not gradient.any() for step in watch.gradients for gradient in step.values()) and len(watch.gradients[0]) > 10
    assert "ratio/mean" not in watch.metrics[0] and watch.metrics[0]["frac_reward_zero_std"] == 1


def sequences(prompts, lengths):
    return Sequences(*pad_left(prompts, 0, "cpu"), *pad_right([[5] * length for length in lengths], 0, "cpu"))


def test_rows_are_split_where_the_next_would_not_fit():
    same = sequences([[1, 2, 3, 4]] * 4, [2, 2, 3, 1])  # 4 + 2, then 2, 3 and 1
    assert split_by_tokens(same, 12) == [slice(0, 4)]
    assert split_by_tokens(same, 11) == [slice(0, 3), slice(3, 4)]
    assert split_by_tokens(same, 8) == [slice(0, 2), slice(2, 4)], "a prompt counts again in the next run"
    assert split_by_tokens(same, 1) == [slice(row, row + 1) for row in range(4)], "a row is never cut"
    other = sequences([[1, 2], [1, 2], [3]], [1, 1, 4])
    assert split_by_tokens(other, 9) == [slice(0, 3)] and split_by_tokens(other, 8) == [slice(0, 2), slice(2, 3)]
    assert split_by_tokens(other.rows(torch.zeros(0, dtype=torch.long)), 8) == []


# ---- metrics of the micro-batches of a step


def summed(micro_batches, *updates):
    metrics = StepMetrics()
    results = [metrics.update({n: torch.tensor(v) for n, v in shares.items()}, micro_batches) for shares in updates]
    # At the end, so that a result that is changed later would show.
    return [{name: float(value) for name, value in result.items()} for result in results]


def test_shares_add_up_of_extremes_one_counts_and_the_next_step_starts_anew():
    named = [{"loss": value, "ratio/max": value, "weight/min": value} for value in (4.0, 8.0, 2.0, 1.0)]
    results = summed(2, *named, {"loss": 1.0}, {"loss": 1.0, "kl": 0.5})
    assert results[:4] == [
        {"loss": 4.0, "ratio/max": 4.0, "weight/min": 4.0},
        {"loss": 12.0, "ratio/max": 8.0, "weight/min": 4.0},
        {"loss": 2.0, "ratio/max": 2.0, "weight/min": 2.0},
        {"loss": 3.0, "ratio/max": 2.0, "weight/min": 1.0},
    ]
    assert results[5] == {"loss": 2.0, "kl": 0.5}, "a name that comes later in a step"


# ---- metrics of a rollout are there at every step that it is used for, although they are logged once


class Seen(Callback):
    """What Lightning knows after each micro-batch, and the mean reward of the rollout that it comes from."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        known = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.steps.append(([float(metrics["reward"]) for metrics in known], float(pl_module.last_rollout[1].total.mean())))


@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 3}], ids=["whole rollouts", "epochs that end within a rollout"])
def test_every_step_and_a_logger_have_the_metrics_of_the_rollout(model, sums, tmp_path, flags):
    seen, logger = Seen(), CSVLogger(tmp_path, "log", version=0)
    flags = {"max_steps": 8, "logger": logger, "log_every_n_steps": 2, **flags}
    fit(model, sums, tmp_path, seen, policy={"minibatches_per_rollout": 2}, **flags)
    assert len(seen.steps) == 8 and len({reward for _, reward in seen.steps}) == 4
    for known, reward in seen.steps:
        assert known == pytest.approx([reward] * 3)
    logger.save()
    with (tmp_path / "log/version_0/metrics.csv").open() as file:
        logged = [float(row["reward"]) for row in csv.DictReader(file) if row["reward"]]
    assert logged == pytest.approx([reward for _, reward in seen.steps[1::2]]), "at whichever step it is asked"


def names_of(log):
    """First parts of the names of all that was logged in training."""
    return {name.partition("/")[0] for step in log.metrics for name in step} - {"val"}


@pytest.mark.parametrize(
    "policy",
    [
        {"loss": GSPOLoss(kl_coef=0.1, entropy_coef=0.1), "correction": TokenTruncation(cap=2.0), "token_mask": TopEntropyMask()},
        {"loss": CISPOLoss(), "dynamic_sampling": DynamicSampling(), "reward": StartsWithDigit()},
        {"loss": SAPOLoss(), "minibatches_per_rollout": 2},
    ],
    ids=["corrected", "dynamic", "smooth"],
)
def test_what_a_policy_logs_is_known_before(model, sums, tmp_path, policy):
    log = Log()
    module = fit(model, sums, tmp_path, StepTimer(), log, policy=policy)
    assert {"loss", "reward", "time"} <= names_of(log) <= module.training_metrics


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_what_examples_log_is_known_before(model, tmp_path, kind):
    log, rows = Log(), write_rows(tmp_path / "rows.jsonl")
    module = fit_examples(kind, model, rows, tmp_path, StepTimer(), log, max_steps=2)
    assert {"loss", "time"} <= names_of(log) <= module.training_metrics


# ---- tokens of a pass that the memory of a device has decided go into checkpoints, so that a resume splits rows alike


GIB = 2**30


@pytest.fixture
def device(monkeypatch):
    """Lets the CPU be a device with some memory, and chooses tokens by it."""

    def become(memory, tokens):
        monkeypatch.setattr(update, "memory_of", lambda device: memory)
        monkeypatch.setattr(update, "default_token_budget", lambda model, device: tokens)

    return become


def test_a_resume_takes_those_of_the_checkpoint_where_they_fit(model, sums, tmp_path, device, monkeypatch):
    said, path = [], tmp_path / "first.ckpt"
    monkeypatch.setattr(update, "rank_zero_info", said.append)
    device(80 * GIB, 24)
    fit(model, sums, tmp_path, max_steps=1).trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)[CHECKPOINT_KEY]["tokens_of_pass"] == {"tokens": 24, "memory": 80 * GIB}
    for memory, taken in ((80 * GIB, 24), (141 * GIB, 24), (None, 12), (40 * GIB, 12)):
        assert not said
        device(memory, 12)
        assert fit(model, sums, tmp_path, ckpt=path, max_steps=2).tokens_of_pass == taken
    assert said and all("this device has 40 GiB" in line for line in said)


def test_an_option_goes_before_and_a_cpu_keeps_nothing(model, sums, tmp_path, device):
    for memory, options in ((80 * GIB, {"max_tokens_per_micro_batch": 100}), (None, {})):
        device(memory, 24)
        policy = fit(model, sums, tmp_path, build_adapter(), policy=options, max_steps=1)
        policy.trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert "tokens_of_pass" not in torch.load(tmp_path / "run.ckpt", weights_only=True)[CHECKPOINT_KEY]
        assert policy.update.token_budget() == (100 if options else 24)
