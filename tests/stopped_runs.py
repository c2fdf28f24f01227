"""A small run, moments of its life at which a signal may come, and the curves of what it and others leave."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_lightning.adapters import AdapterPlan, Scoring
from hybrid_lightning.callbacks import RunSummary
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.sharding.checkpoints import WholeFiles
from hybrid_lightning.training import PolicyModule, evaluation, generation
from hybrid_lightning.training.loop import RLLoop

# An epoch has three rollouts of two steps of two micro-batches; a validation comes after the fourth step, and one at the end.
FIT = (
    "fit",
    "--config=t.yaml",
    "--trainer.max_steps=7",
    "--trainer.val_check_interval=8",
    "--trainer.accumulate_grad_batches=2",
    "--data.source.validation_fraction=0.5",
    "--data.validation_prompts=4",
    "--adapter.dropout=0.1",
    "--model.max_tokens_per_micro_batch=100",
    "--checkpoint.monitor=val/avg@2",
)
# Where a signal comes: a function, and which of its calls. Three rollouts score the modules.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "the first completions for scoring": (Sampler, "sample", 1),
    "a reward for scoring": (generation, "evaluate_reward", 2),
    "a gradient for scoring": (Scoring, "check_loss", 2),
    "a score": (Scoring, "_score", 3),
    "the plan is written": (AdapterPlan, "save", 1),
    "the first validation": (evaluation, "evaluation_draws", 1),
    "the first rollout": (RLLoop, "begin", 1),
    "the middle of the first step": (PolicyModule, "training_step", 2),
    "old log-probabilities": (RLLoop, "add_logprobs", 2),
    "the second rollout": (RLLoop, "begin", 2),
    "the middle of a later step": (PolicyModule, "training_step", 6),
    "the step before a validation": (PolicyModule, "on_before_optimizer_step", 4),
    "a validation": (evaluation, "evaluation_draws", 2),
    "a checkpoint is saved": (WholeFiles, "save_checkpoint", 1),
    "the last update of an epoch": (PolicyModule, "training_step", 12),
    "the first rollout of an epoch": (RLLoop, "begin", 4),
    "the last validation": (evaluation, "evaluation_draws", 3),
    "the summary": (RunSummary, "_summary", 1),
}


class Sent:
    """Sends a signal to this process as a function is called for the n-th time."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: tuple[Any, str, int], number: int) -> None:
        place, name, self.call = moment
        self.number, self.calls = number, 0
        patch.setattr(place, name, self._wrapped(getattr(place, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.call:
                os.kill(os.getpid(), self.number)
            return function(*arguments, **options)

        return wrapper


def points(*runs: Path) -> dict[tuple[str, int], float]:
    """All points of the curves of runs, but for times; those that two of them have are the same."""
    found: dict[tuple[str, int], float] = {}
    for folder in runs:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(("time/", "throughput/")) or "time step_s" in tag or "throughput" in tag:
                continue
            for event in events.Scalars(tag):
                assert found.setdefault((tag, event.step), event.value) == event.value, (tag, event.step)
    return found


def run_of(result: Result, folder: Path) -> Path:
    """The run folder that a command names last."""
    return folder / re.findall(r"(runs/default/version_\d+)", result.out)[-1]
