"""`Diagnosis`: says while a run trains what keeps it from learning, and gives the verdict at its end; `StepLines` says each step.

What calibration and the first validation show is said before the first step, and what goes wrong later once it is seen. `doctor`
looks for the same without a run (`callbacks/doctor.py`); what counts as a finding is in `reports/findings.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybrid_lightning.callbacks.display import console, say
from hybrid_lightning.callbacks.rollouts import OncePerRollout
from hybrid_lightning.metrics import LOWER, UPPER
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.reports.findings import PAGE, Finding, Watch, of_cut, of_rollouts, worse
from hybrid_lightning.reports.references import reference_rewards
from hybrid_lightning.types import Rewards, Rollouts, counted_groups

_REFERENCES = 8  # reference answers that are tried before the first step
_NORMS = ("grad_norm/full", "grad_norm/lora")


class Diagnosis(OncePerRollout):
    """Says what keeps a `PolicyModule` from learning, each thing once, with its remedy and a section of the docs.

    Before the first step: completions of calibration (or of the first rollout) and of the first validation that are cut or all
    earn the same, and reference answers for which the reward pays nothing. Later: rollouts without a gradient, a reward that
    falls below that of the start, a policy whose ratio or entropy collapses. The run summary ends with `verdict`.
    """

    def __init__(self) -> None:
        self.found: dict[str, Finding] = {}  # what was said, by its kind: each once
        self._watch: Watch | None = None
        self._begun = False

    # ---- before the first step

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the first validation."""
        if isinstance(pl_module, PolicyModule) and pl_module.episodes is None:  # which also end for other reasons
            values = pl_module.last_evaluation.get("", {})
            right = values.get(f"avg@{pl_module.eval_samples}", 0.0)
            share = values.get("truncation_rate", 0.0)
            at_least = share - right  # are cut and not right
            self._say(trainer, *of_cut(share, at_least, "the first validation", pl_module.sampler.max_new_tokens))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the completions of calibration, if they were made."""
        if not isinstance(pl_module, PolicyModule) or not trainer.is_global_zero:
            return
        calibration, pl_module.last_calibration = pl_module.last_calibration, None
        if calibration is not None and not self._begun:
            self._begin(trainer, pl_module, *calibration, "the calibration")

    def _begin(self, trainer: Trainer, policy: PolicyModule, rollouts: Rollouts, rewards: Rewards, where: str) -> None:
        """Look at the first completions that there are, and ask the reward for reference answers."""
        self._begun = True
        credited = policy.credited(rollouts, rewards)
        self._say(trainer, *of_rollouts(rollouts, rewards, where, policy.sampler.max_new_tokens, credited))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = getattr(data, "train_prompts", None)
        if prompts:
            solved = policy.last_evaluation.get("", {}).get(f"avg@{policy.eval_samples}", 0.0) > 0
            pays = solved or bool(rewards.of_counted().correct.any())
            self._say(trainer, *reference_rewards(policy, prompts, getattr(data, "format", None), _REFERENCES, pays).findings)

    # ---- in training

    def on_rollout(self, trainer: Trainer, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> None:
        """Look at a rollout."""
        policy = trainer.lightning_module
        if not isinstance(policy, PolicyModule) or not trainer.is_global_zero:
            return
        if not self._begun:
            self._begin(trainer, policy, rollouts, rewards, "the first rollout")
        groups = counted_groups(rewards.total, rollouts.samples_per_prompt, rewards.counted)
        if not groups:
            return
        means = torch.cat([rewards.total[rows].mean(dim=1) for rows in groups])
        spread = float(means.std()) if len(means) > 1 else 0.0
        self._say(trainer, *self._watched(policy).add_rollout(self._metrics, float(rewards.of_counted().total.min()), spread))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the rollout of the batch if it is a new one, by the metrics that come with it."""
        self._metrics: Mapping[str, float] = getattr(batch, "metrics", {})
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at an optimizer step."""
        if isinstance(pl_module, PolicyModule) and trainer.is_global_zero and not trainer.fit_loop._should_accumulate():
            self._say(trainer, *self._watched(pl_module).add_step(_logged(trainer, ("entropy", "ratio/mean", *_NORMS))))

    def _watched(self, policy: PolicyModule) -> Watch:
        self._watch = self._watch or Watch(policy.rollout_schedule.prompts_per_rollout)
        return self._watch

    def _say(self, trainer: Trainer, *findings: Finding) -> None:
        for finding in findings:
            if finding.level != "note" and finding.kind not in self.found:
                self.found[finding.kind] = finding
                if trainer.is_global_zero:
                    say(f"Warning: {finding}")

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said, so that a resumed run goes on from there."""
        found = {kind: vars(finding) for kind, finding in self.found.items()}
        return {"begun": self._begun, "found": found, "watch": self._watch and vars(self._watch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._begun = state_dict["begun"]
        self.found = {kind: Finding(**found) for kind, found in state_dict["found"].items()}
        self._watch = state_dict["watch"] and Watch(**state_dict["watch"])

    # ---- at the end

    def verdict(self, before: Mapping[str, float], after: Mapping[str, float], samples: int) -> tuple[str, list[str]]:
        """Whether the policy has learned by the metrics of the validations before training and at its end, and what to try.

        `samples` is the n of `val/avg@n`.
        """
        tries, watch = [finding.advice for finding in self.found.values()], self._watch
        if watch is not None and watch.steps and watch.idle == watch.steps:
            return "nothing was learned: no step had a gradient", tries
        name, sign = (f"val/avg@{samples}", 1) if f"val/avg@{samples}" in after else ("val/loss", -1)
        if name not in before or name not in after:
            return "not measured, since there is no validation before and after", tries
        low, high = (before.get(f"{name}/{end}", before[name]) for end in (LOWER, UPPER))
        if low <= after[name] <= high:
            text = "no change that is larger than the interval of the start"
            return text, tries or [f"train longer, or raise the rates ({PAGE}#the-reward-does-not-move)"]
        if (after[name] - before[name]) * sign > 0:
            return "learned", tries
        return "worse than at the start", tries or [worse("").advice]


class StepLines(Callback):
    """A line for each optimizer step, where the screen is a file that has no progress bar; in a notebook one that changes."""

    def __init__(self) -> None:
        self._shown: Any = None  # the line of a notebook

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a line."""
        self._shown = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say the step, after `StepTimer` has measured it."""
        if trainer.fit_loop._should_accumulate() or not trainer.is_global_zero:
            return
        steps = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        names = ("loss", *getattr(pl_module, "shown_metrics", ()), "accuracy", "entropy", *_NORMS, "time/step_s")
        shown = (f"{name} {value:.4g}" for name, value in _logged(trainer, dict.fromkeys(names)).items())
        text = f"Step {trainer.global_step}{steps}: {'  '.join(shown)}"
        if not console().is_jupyter:
            say(text)
            return
        from IPython.display import display

        self._shown = self._shown or display(display_id=True)  # type: ignore[no-untyped-call]
        self._shown.update({"text/plain": text}, raw=True)


def _logged(trainer: Trainer, names: Iterable[str]) -> dict[str, float]:
    """What the last optimizer step has logged under these names."""
    values = trainer.callback_metrics
    return {name: float(values[name]) for name in names if name in values}
