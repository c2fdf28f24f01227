"""Metrics of a rollout are there at every optimizer step that it is used for, although they are logged once."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny_examples import fit as fit_examples
from tiny_examples import write_rows
from tiny_runs import StartsWithDigit, fit, write_model, write_sums

from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.losses import CISPOLoss, GSPOLoss, SAPOLoss, TokenTruncation, TopEntropyMask
from hybrid_lightning.policy.update import TRAINING_METRICS
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling


class Seen(Callback):
    """What Lightning knows after each micro-batch, and the mean reward of the rollout that it comes from."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        known = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.steps.append(([float(metrics["reward"]) for metrics in known], float(pl_module.last_rollout[1].total.mean())))


@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 3}], ids=["whole rollouts", "epochs that end within a rollout"])
def test_every_step_has_the_metrics_of_its_rollout(tmp_path, flags):
    model, sums, seen = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl"), Seen()
    fit(model, sums, tmp_path / "runs", seen, policy={"minibatches_per_rollout": 2}, max_steps=8, **flags)
    assert len(seen.steps) == 8 and len({reward for _, reward in seen.steps}) == 4
    for known, reward in seen.steps:
        assert known == pytest.approx([reward] * 3)


def test_a_logger_gets_them_at_whichever_step_it_is_asked(tmp_path):
    model, sums, seen = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl"), Seen()
    logger = CSVLogger(tmp_path / "log")
    fit(
        model,
        sums,
        tmp_path / "runs",
        seen,
        policy={"minibatches_per_rollout": 2},
        max_steps=8,
        logger=logger,
        log_every_n_steps=2,
    )
    logger.save()
    rows = [line.split(",") for line in (tmp_path / "log/lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    place = rows[0].index("reward")
    logged = [float(row[place]) for row in rows[1:] if row[place]]
    assert logged == pytest.approx([reward for _, reward in seen.steps[1::2]])


class Names(Callback):
    """First parts of the names of all that is logged in training."""

    def __init__(self):
        self.found = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found |= {name.partition("/")[0] for name in trainer.callback_metrics} - {"val"}


@pytest.mark.parametrize(
    "policy",
    [
        {"loss": GSPOLoss(kl_coef=0.1, entropy_coef=0.1), "correction": TokenTruncation(cap=2.0), "token_mask": TopEntropyMask()},
        {"loss": CISPOLoss(), "dynamic_sampling": DynamicSampling(), "reward": StartsWithDigit()},
        {"loss": SAPOLoss(), "minibatches_per_rollout": 2},
    ],
    ids=["corrected", "dynamic", "smooth"],
)
def test_what_a_policy_logs_is_known_before(tmp_path, policy):
    names = Names()
    fit(
        write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl"), tmp_path / "runs", StepTimer(), names, policy=policy
    )
    assert {"loss", "reward", "time"} <= names.found <= TRAINING_METRICS


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_what_examples_log_is_known_before(tmp_path, kind):
    names, rows = Names(), write_rows(tmp_path / "rows.jsonl")
    fit_examples(kind, write_model(tmp_path / "model"), rows, tmp_path / "runs", StepTimer(), names, max_steps=2)
    assert {"loss", "time"} <= names.found <= TRAINING_METRICS
