"""`StepTimer`: where the time of a run goes, and how many tokens a second it makes of it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hybrid_lightning.policy.step_times import PhaseClock, Spread
from hybrid_lightning.types import PolicyBatch

# Of a rollout, before its first optimizer step; the module marks them on its `clock`.
ROLLOUT_PHASES = ("generate", "reward", "logprobs")
STEP_PHASES = (*ROLLOUT_PHASES, "update", "other")
# Beside the steps: none of them is in `time/step_s`.
RUN_PHASES = (*STEP_PHASES, "validation", "checkpoint", "scoring", "startup")
_ROLLOUT_TOKENS = ("generated_tokens", "tokens")
_SECONDS_FOR = {"generated_tokens": ("generate",), "trained_tokens": ("logprobs", "update"), "tokens": STEP_PHASES}


class StepTimer(Callback):
    """Logs the time of every optimizer step by phase and the tokens per second, and adds both up over the run.

    Must stand before all other callbacks, so that their time is `other` and the scoring is seen.

    Logged for each optimizer step, in seconds:

    - `time/generate_s`, `time/reward_s` (advantages included) and `time/logprobs_s` (old and reference log-probabilities). They
      are spent once a rollout and shared evenly among the optimizer steps that the rollout serves.
    - `time/update_s`: forward, backward and optimizer step of all micro-batches.
    - `time/other_s`: everything else since the step before: data, logging, callbacks, waiting for slower processes.
    - `time/step_s`: the sum. Validation, checkpoints, scoring and startup are in none of them.

    So the values of all steps add up to the time spent, except for shares of a rollout that the run ended within, and for
    what follows the last step. And tokens per second of all processes, of the same steps:

    - `throughput/generated_tokens_per_second`: sampled tokens per second of generation.
    - `throughput/trained_tokens_per_second`: completion tokens of the optimizer step (`PolicyBatch.num_tokens`) per second of
      update and log-probabilities. Rows without advantage count, whether or not the update computes anything for them.
    - `throughput/tokens_per_second`: prompt and completion tokens of the rollout (`num_tokens`), each counted once however often
      the rollout is trained on, per second of the steps that it serves: the speed of the whole.

    Times are averaged over processes, `totals` are those of this process. The clock waits for an accelerator once where each
    rollout phase and each optimizer step ends.

    A module that has an attribute `clock` marks the phases of its rollouts on it, and where the update begins; for others the
    update begins with this callback's `on_train_batch_start`.
    """

    def __init__(self) -> None:
        self.clock = PhaseClock()
        self._forget()

    def _forget(self) -> None:
        self._earlier_seconds: dict[str, float] = {}  # of the runs that this one resumes
        self._tokens: dict[str, float] = {}  # of all processes and steps, those of earlier runs included
        self._spread = Spread()
        self._stamp: dict[str, float] = {}  # the clock at the end of the last optimizer step

    def totals(self) -> dict[str, float]:
        """Seconds of each of `RUN_PHASES`, earlier parts of a resumed run included; they add up to the wall time."""
        now = self.clock.seconds()
        return {name: self._earlier_seconds.get(name, 0.0) + now.get(name, 0.0) for name in RUN_PHASES}

    def rates(self) -> dict[str, float]:
        """Tokens per second over all steps: `generated_tokens_per_second` and so on, of what has happened."""
        return _rates(self._tokens, self.totals())

    # ---- the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock: scoring, which comes next, counts."""
        if stage != "fit":
            return
        self._forget()
        self.clock.device = trainer.strategy.root_device
        self.clock.restart("startup")
        if hasattr(pl_module, "clock"):
            pl_module.clock = self.clock  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        spread = {"amounts": self._spread.amounts, "steps": self._spread.steps}
        return {"seconds": self.totals(), "tokens": self._tokens, "spread": spread}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over from the run that is resumed."""
        self._earlier_seconds, self._tokens = state_dict["seconds"], state_dict["tokens"]
        self._spread = Spread(**state_dict["spread"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step begins."""
        self.clock.switch("other", synchronize=True)
        self._stamp = self.clock.seconds()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of a step, that before training no part of the startup."""
        if trainer.state.fn == "fit":
            self.clock.enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what ran before."""
        if trainer.state.fn == "fit":
            self.clock.leave()

    # ---- a step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The update begins, unless the module says so itself, after all callbacks."""
        if not hasattr(pl_module, "clock"):
            self.clock.switch("update")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The update of a micro-batch ends, and with the last one the step."""
        last = not trainer.fit_loop._should_accumulate()
        self.clock.switch("other", synchronize=last)
        if last:
            pl_module.log_dict(self._measure_step(trainer, pl_module, batch), on_step=True, on_epoch=False)

    def _measure_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        now = self.clock.seconds()
        spent = {name: now.get(name, 0.0) - self._stamp.get(name, 0.0) for name in STEP_PHASES}
        self._stamp = now
        tokens = _rollout_tokens(pl_module) if spent["generate"] > 0 else dict.fromkeys(_ROLLOUT_TOKENS, 0.0)
        step = _mean_over_processes(trainer, {**spent, **tokens})
        if step["generate"] > 0:
            self._spread.put({name: step[name] for name in (*ROLLOUT_PHASES, *_ROLLOUT_TOKENS)}, _steps_of_a_rollout(pl_module))
            self._count({name: step[name] * trainer.world_size for name in _ROLLOUT_TOKENS})
        step |= self._spread.take()
        trained = batch.num_tokens if isinstance(batch, PolicyBatch) else 0.0
        self._count({"trained_tokens": trained})
        tokens = {"trained_tokens": trained, **{name: step[name] * trainer.world_size for name in _ROLLOUT_TOKENS}}
        times = {f"time/{name}_s": step[name] for name in STEP_PHASES}
        rates = {f"throughput/{name}": value for name, value in _rates(tokens, step).items()}
        return {**times, "time/step_s": sum(times.values()), **rates}

    def _count(self, tokens: Mapping[str, float]) -> None:
        for name, value in tokens.items():
            self._tokens[name] = self._tokens.get(name, 0.0) + value


def find_step_timer(trainer: Trainer) -> StepTimer | None:
    """The Trainer's `StepTimer`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, StepTimer)), None)  # type: ignore[attr-defined]


def measured(trainer: Trainer, phase: str) -> AbstractContextManager[None]:
    """Charge what runs within to a phase of the Trainer's `StepTimer`, if it has one."""
    timer = find_step_timer(trainer)
    return nullcontext() if timer is None else timer.clock.phase(phase)


def _rollout_tokens(pl_module: LightningModule) -> dict[str, float]:
    """Tokens of the last rollout of this process: completions alone, and with the prompt of each."""
    sequences = pl_module.last_rollout[0].sequences  # type: ignore[index, union-attr]
    completions = float(sequences.completion_mask.sum())
    return {"generated_tokens": completions, "tokens": completions + float(sequences.prompt_mask.sum())}


def _steps_of_a_rollout(pl_module: LightningModule) -> int:
    schedule = pl_module.rollout_schedule
    return schedule.epochs_per_rollout * schedule.minibatches_per_rollout  # type: ignore[union-attr, operator, return-value]


def _mean_over_processes(trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
    """All values in one reduction, and none in a single process."""
    if trainer.world_size == 1:
        return dict(values)
    summed = trainer.strategy.reduce(torch.tensor(list(values.values()), device=trainer.strategy.root_device), reduce_op="mean")
    assert isinstance(summed, torch.Tensor)
    return dict(zip(values, summed.tolist(), strict=True))


def _rates(tokens: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second, of those tokens that there are and of phases that took time."""
    spent = {name: sum(seconds[phase] for phase in phases) for name, phases in _SECONDS_FOR.items()}
    return {f"{name}_per_second": tokens[name] / spent[name] for name in spent if tokens.get(name) and spent[name] > 0}
