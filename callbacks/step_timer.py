"""`StepTimer`: measures where a run spends its time, and its tokens per second."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.callbacks.run_folder import find_callback
from hybrid_lightning.training.lightning_internals import ends_step
from hybrid_lightning.training.module import LanguageModule
from hybrid_lightning.training.step_times import Amortized, PhaseClock
from hybrid_lightning.types import PolicyBatch, Rollout

# Phases of a rollout, before its first optimizer step; the module marks them on its `clock`.
ROLLOUT_PHASES = ("generate", "reward", "logprobs")
STEP_PHASES = (*ROLLOUT_PHASES, "update", "other")
# The phases after STEP_PHASES are outside steps: `time/step_s` does not include them.
RUN_PHASES = (*STEP_PHASES, "validation", "checkpoint", "scoring", "startup")
_ROLLOUT_TOKENS = ("generated_tokens", "tokens")
_SECONDS_FOR = {"generated_tokens": ("generate",), "trained_tokens": ("logprobs", "update"), "tokens": STEP_PHASES}


class StepTimer(Callback):
    """Logs the time of every optimizer step by phase and the tokens per second, and sums both over the run.

    It must come before all other callbacks, so that their time counts as `other`, and scoring is measured.

    For each optimizer step it logs, in seconds:

    - `time/generate_s`, `time/reward_s` (advantages included) and `time/logprobs_s` (old and reference log-probabilities). This
      time is spent once per rollout, and divided evenly among the optimizer steps of the rollout.
    - `time/update_s`: forward, backward and optimizer step of all micro-batches.
    - `time/other_s`: everything else since the last step: data, logging, callbacks, waiting for slower processes.
    - `time/step_s`: the sum. Validation, checkpoints, scoring and startup are not part of any of these.

    So the values of all steps add up to the time spent, except for the rest of an unfinished rollout at the end of the run, and
    for the time after the last step. It also logs the tokens per second of all processes in the same steps:

    - `throughput/generated_tokens_per_second`: sampled tokens per second of generation; not with `rollouts_ahead`, where
      `time/generate_s` is the time that training waits.
    - `throughput/trained_tokens_per_second`: sampled tokens of the optimizer step (`PolicyBatch.num_tokens`) per second of
      update and log-probabilities. Rows without advantage count, whether or not the update computes anything for them.
    - `throughput/tokens_per_second`: prompt and completion tokens of the rollout (`num_tokens`) per second of the rollout's
      steps: the total speed. Each token counts once, however often the rollout is trained on.

    Times are averages over processes; `totals` are this process's times. The clock synchronizes with an accelerator once at the
    end of each rollout phase and of each optimizer step.

    A module with an attribute `clock` marks the phases of its rollouts and the beginning of the update on it. For other modules
    the update begins with this callback's `on_train_batch_start`.
    """

    def __init__(self) -> None:
        self.clock = PhaseClock()
        self._forget()

    def _forget(self) -> None:
        self._earlier_seconds: dict[str, float] = {}  # times of the earlier runs that this one resumes
        self._tokens: dict[str, float] = defaultdict(float)  # all processes and steps, including earlier runs
        self._amortized = Amortized()  # divides a rollout's cost among its steps
        self._rollout: int | None = None  # number of the rollout being trained on
        self._stamp: dict[str, float] = {}  # the clock at the end of the last optimizer step

    def totals(self) -> dict[str, float]:
        """Seconds of each of `RUN_PHASES`, including earlier parts of a resumed run; they add up to the wall time."""
        now = self.clock.seconds()
        return {name: self._earlier_seconds.get(name, 0.0) + now.get(name, 0.0) for name in RUN_PHASES}

    def rates(self) -> dict[str, float]:
        """Tokens per second over all steps, `generated_tokens_per_second` and so on, for phases that have taken place."""
        return _rates(self._tokens, self.totals())

    # ---- the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, before the modules are scored."""
        if stage != "fit":
            return
        self._forget()
        self.clock.restart("startup", trainer.strategy.root_device)
        if isinstance(pl_module, LanguageModule):
            pl_module.run.clock = self.clock

    def state_dict(self) -> dict[str, Any]:
        """Times and tokens so far, for a resumed run."""
        spread = {"amounts": self._amortized.amounts, "steps": self._amortized.steps}
        return {"seconds": self.totals(), "tokens": dict(self._tokens), "spread": spread, "rollout": self._rollout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the times and tokens of the resumed run."""
        self._earlier_seconds, self._tokens = state_dict["seconds"], defaultdict(float, state_dict["tokens"])
        self._amortized, self._rollout = Amortized(**state_dict["spread"]), state_dict["rollout"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first step."""
        self.clock.switch("other", synchronize=True)
        self._stamp = self.clock.seconds()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure validation separately: it does not count as a step, or before training as startup."""
        if trainer.state.fn == "fit":
            self.clock.enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the phase before the validation."""
        if trainer.state.fn == "fit":
            self.clock.leave()

    # ---- a step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the update, unless the module itself marks its beginning, after all callbacks."""
        if not isinstance(pl_module, LanguageModule):
            self.clock.switch("update")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the update of a micro-batch, and with the last micro-batch the step."""
        last = ends_step(trainer)
        self.clock.switch("other", synchronize=last)
        if last:
            pl_module.log_dict(self._measure_step(trainer, pl_module, batch), on_step=True, on_epoch=False)

    def _measure_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        now = self.clock.seconds()
        spent = {name: now.get(name, 0.0) - self._stamp.get(name, 0.0) for name in STEP_PHASES}
        self._stamp = now
        schedule = pl_module.task.schedule if isinstance(pl_module, LanguageModule) else None
        tokens, begins = dict.fromkeys(_ROLLOUT_TOKENS, 0.0), spent["generate"] > 0
        if schedule is not None and schedule.rollouts_ahead:  # its time includes generating other rollouts
            begins, self._rollout = batch.rollout_number != self._rollout, batch.rollout_number
            tokens["tokens"] = batch.metrics["num_tokens"] / trainer.world_size if begins else 0.0
        elif begins:
            tokens = _rollout_tokens(batch.rollout)
        step = _mean_over_processes(trainer, {**spent, **tokens})
        if begins or step["generate"] > 0:
            steps = schedule.steps_per_rollout if begins and schedule is not None else max(1, self._amortized.steps)
            self._amortized.put({name: step[name] for name in (*ROLLOUT_PHASES, *_ROLLOUT_TOKENS)}, steps)
            for name in _ROLLOUT_TOKENS:
                self._tokens[name] += step[name] * trainer.world_size
        step |= self._amortized.take()
        trained = batch.num_tokens if isinstance(batch, PolicyBatch) else 0.0
        self._tokens["trained_tokens"] += trained
        tokens = {"trained_tokens": trained, **{name: step[name] * trainer.world_size for name in _ROLLOUT_TOKENS}}
        times = {f"time/{name}_s": step[name] for name in STEP_PHASES}
        rates = {f"throughput/{name}": value for name, value in _rates(tokens, step).items()}
        return {**times, "time/step_s": sum(times.values()), **rates}


def time_charged_to(trainer: Trainer, phase: str) -> AbstractContextManager[None]:
    """Charge the time within this context to a phase of the Trainer's `StepTimer`, if it has one."""
    timer = find_callback(trainer, StepTimer)
    return nullcontext() if timer is None else timer.clock.phase(phase)


def _rollout_tokens(rollout: Rollout) -> dict[str, float]:
    """Tokens of this process's rollout: the sampled ones, and all tokens with prompts and added ones."""
    sequences = rollout.sequences
    tokens = float(sequences.completion_mask.sum()) + float(sequences.prompt_mask.sum())
    return {"generated_tokens": float(sequences.sampled_mask.sum()), "tokens": tokens}


def _mean_over_processes(trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
    """Means over processes, with one reduction for all values; a single process does not need one."""
    if trainer.world_size == 1:
        return dict(values)
    summed = trainer.strategy.reduce(torch.tensor(list(values.values()), device=trainer.strategy.root_device), reduce_op="mean")
    assert isinstance(summed, torch.Tensor)
    return dict(zip(values, summed.tolist(), strict=True))


def _rates(tokens: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second, for tokens that were counted and phases that took time."""
    spent = {name: sum(seconds[phase] for phase in phases) for name, phases in _SECONDS_FOR.items()}
    return {f"{name}_per_second": tokens[name] / spent[name] for name in spent if tokens.get(name) and spent[name] > 0}
