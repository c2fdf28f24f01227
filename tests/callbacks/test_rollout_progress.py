import io

import pytest
import rich
import torch
from lightning.pytorch import Callback
from rich.console import Console
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, write_model, write_sums

from hybrid_lightning.callbacks import RolloutProgress, RunSummary
from hybrid_lightning.callbacks.display import progress_bar


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("progress") / "model")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("progress") / "sums.jsonl", 24)


@pytest.fixture
def screen(monkeypatch):
    """A terminal that keeps what was written to it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None, raising=False)
    return console


class Watch(Callback):
    """Notes the bars at every micro-batch, and the generation bar at every token."""

    def __init__(self):
        self.totals, self.generation, self.metrics = [], [], []

    def on_train_start(self, trainer, pl_module):
        pl_module.generation_listeners.append(lambda *state: self.on_token(trainer.progress_bar_callback, state))

    def on_token(self, bar, state):
        task = next(task for task in bar.progress.tasks if task.id == bar._generation_task)
        self.generation.append((state, (task.completed, task.total, task.visible), task.description))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bar = trainer.progress_bar_callback
        (task,) = (task for task in bar.progress.tasks if task.id == bar.train_progress_bar_id)
        self.totals.append(task.total)
        self.metrics.append(bar.get_metrics(trainer, pl_module))


def run(model, sums, root, *callbacks, **flags):
    torch.manual_seed(0)
    watch, policy = Watch(), build_policy(model)
    flags = {"enable_progress_bar": True, "num_sanity_val_steps": -1, **flags}
    trainer = build_trainer(root, RolloutProgress(), build_adapter(), *callbacks, watch, **flags)
    trainer.fit(policy, datamodule=build_data(sums, validation_fraction=0.3))
    return watch, policy


def test_generation_has_a_bar_that_is_hidden_when_done_beside_reward_and_length(model, sums, tmp_path, screen):
    watch, policy = run(model, sums, tmp_path, RunSummary(), max_steps=2, limit_val_batches=0)
    assert len(watch.generation) == 12
    for (running, decoded, total), (completed, of, visible), description in watch.generation:
        assert "Generating" in description and (completed, of) == (decoded, total)
        assert visible == (running > 0 and decoded < total)
    assert watch.metrics[0].keys() >= {"reward", "completions/mean_length"} and "v_num" not in watch.metrics[0]
    output = screen.file.getvalue()
    assert "reward: " in output and "completions/mean_length: " in output and "epoch 0" in output.lower()
    assert [listener for listener in policy.generation_listeners if "RolloutProgress" in str(listener)] == [], "after the run"


def test_the_bar_ends_where_the_run_does(model, sums, tmp_path, screen):
    watch, _ = run(model, sums, tmp_path, max_steps=3, accumulate_grad_batches=2, limit_val_batches=0)
    assert watch.totals == [6] * 6
    watch, _ = run(model, sums, tmp_path, max_steps=-1, max_epochs=1, limit_val_batches=0)
    assert watch.totals == [4] * 4
    watch, _ = run(model, sums, tmp_path, max_steps=6, limit_val_batches=0)
    assert watch.totals == [4] * 4 + [2] * 2


@pytest.mark.parametrize("wanted", [True, False])
def test_scoring_shows_its_bars_only_where_bars_are_wanted(tmp_path, screen, wanted):
    trainer = build_trainer(tmp_path, enable_progress_bar=wanted)
    with progress_bar(trainer, "Scoring modules", None) as advance:
        advance(3, 8)
    assert ("Scoring modules" in screen.file.getvalue()) == wanted
