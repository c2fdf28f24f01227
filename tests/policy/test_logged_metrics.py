"""Metrics of a rollout are there at every optimizer step that it is used for, although they are logged once."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny_examples import fit as fit_examples
from tiny_examples import write_rows
from tiny_runs import StartsWithDigit, fit

from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.losses import CISPOLoss, GSPOLoss, SAPOLoss, TokenTruncation, TopEntropyMask
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling


class Seen(Callback):
    """What Lightning knows after each micro-batch, and the mean reward of the rollout that it comes from."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        known = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.steps.append(([float(metrics["reward"]) for metrics in known], float(pl_module.last_rollout[1].total.mean())))


@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 3}], ids=["whole rollouts", "epochs that end within a rollout"])
def test_every_step_has_the_metrics_of_its_rollout(model, sums, tmp_path, flags):
    seen = Seen()
    fit(model, sums, tmp_path, seen, policy={"minibatches_per_rollout": 2}, max_steps=8, **flags)
    assert len(seen.steps) == 8 and len({reward for _, reward in seen.steps}) == 4
    for known, reward in seen.steps:
        assert known == pytest.approx([reward] * 3)


def test_a_logger_gets_them_at_whichever_step_it_is_asked(model, sums, tmp_path):
    seen, logger = Seen(), CSVLogger(tmp_path / "log")
    flags = {"max_steps": 8, "logger": logger, "log_every_n_steps": 2}
    fit(model, sums, tmp_path, seen, policy={"minibatches_per_rollout": 2}, **flags)
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
def test_what_a_policy_logs_is_known_before(model, sums, tmp_path, policy):
    names = Names()
    module = fit(model, sums, tmp_path, StepTimer(), names, policy=policy)
    assert {"loss", "reward", "time"} <= names.found <= module.training_metrics


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_what_examples_log_is_known_before(model, tmp_path, kind):
    names, rows = Names(), write_rows(tmp_path / "rows.jsonl")
    module = fit_examples(kind, model, rows, tmp_path, StepTimer(), names, max_steps=2)
    assert {"loss", "time"} <= names.found <= module.training_metrics
