"""`Doctor`: looks at one rollout and one optimizer step of a run, and says what will keep it from learning.

`Trainer.doctor` runs a `fit` of one step with this callback. The rollout and the step are those of training, at the full learning
rates; what is trained is a copy of the model that the command has loaded, and nothing is written.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.findings import (
    Change,
    Finding,
    of_agreement,
    of_answers,
    of_change,
    of_gradient,
    of_rollouts,
)
from hybrid_lightning.callbacks.references import References, reference_rewards
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.types import LossInputs, Rewards, Rollouts, Sequences

_PROMPTS, _COMPLETIONS = 4, 2  # that are shown: prompts, and completions of each
_REFERENCES = 32  # reference answers that are tried
_ROWS = 64  # completions on which the change of the policy is measured
_TEXT = 1_500  # characters of a prompt or completion that are shown


class Doctor(Callback):
    """Examines a `PolicyModule` in a `fit` of one optimizer step.

    Args:
        steps: Optimizer steps of the run that is meant; infinite if it has no limit.
        validations: Validations of that run, the one before training included.
        calibration_prompts: Prompts whose completions score its modules; 0 if it does not score.

    Attributes:
        found: The findings, of the first rank.
    """

    def __init__(self, steps: float, validations: float, calibration_prompts: int) -> None:
        self.steps, self.validations, self.calibration_prompts = steps, validations, calibration_prompts
        self.found: list[Finding] = []
        self._before: Tensor | None = None
        self._sequences: Sequences | None = None
        self._change: Change | None = None
        self._metrics: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the policy on some completions before the step."""
        assert isinstance(pl_module, PolicyModule) and pl_module.last_rollout is not None
        if self._before is None:
            rollouts, rewards, _ = pl_module.last_rollout
            self._sequences = pl_module.trained_sequences(rollouts, rewards).rows(slice(0, _ROWS))
            self._before = self._logprobs(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure it again after the step; all ranks compute, since they may hold parts of the model."""
        if trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, PolicyModule) and pl_module.last_rollout is not None
        assert self._before is not None and self._sequences is not None
        after, mask = self._logprobs(pl_module), self._sequences.sampled_mask
        advantages = pl_module.last_rollout[2][: len(mask)]
        reference = self._before if pl_module.loss.needs_reference else None
        entropy = torch.zeros_like(after) if pl_module.loss.needs_entropy else None
        length = float(pl_module.max_completion_tokens)
        inputs = LossInputs(after, advantages, mask, self._before, reference, entropy=entropy, max_completion_tokens=length)
        with torch.no_grad():
            measured = pl_module.loss(inputs).metrics
        self._change = Change.between(self._before, after, mask, measured)
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _logprobs(self, policy: PolicyModule) -> Tensor:
        assert self._sequences is not None
        ((logprobs, _, _),) = policy.update.measure([self._sequences])
        assert logprobs is not None
        return logprobs

    # ---- what is said

    def report(self, policy: PolicyModule, datamodule: Any) -> None:
        """Say everything that was seen, and then the findings."""
        assert policy.last_rollout is not None and self._change is not None
        rollouts, rewards, _ = policy.last_rollout
        own, answers = rewards.of_counted(), policy.answers(rollouts)
        for line in _prompts(policy, rollouts, rewards, answers):
            say(line)
        references = reference_rewards(policy, datamodule.train_prompts, datamodule.format, _REFERENCES, bool(own.correct.any()))
        for name, text in self._values(policy, references, len(rollouts.completions)).items():
            say(f"{name:<16}{text}")
        self.found += [*references.findings, *_tokens(policy, rollouts)]
        seen = of_rollouts(rollouts, rewards, "the rollout", policy.sampler.max_new_tokens)
        equal = self._metrics.get("frac_reward_zero_std", 0.0) == 1
        self.found += [*seen, *(of_answers(answers) if policy.episodes is None else [])]
        norms = {name: value for name, value in self._metrics.items() if name.startswith("grad_norm/")}
        self.found += of_gradient(norms, equal)
        self.found += of_agreement(self._metrics.get("sampling/logp_difference/mean", 0.0), f"torch.{policy.pretrained.dtype}")
        if any(norms.values()):
            self.found += of_change(self._change, self.steps)

    def _values(self, policy: PolicyModule, references: References, completions: int) -> dict[str, str]:
        """Name -> what was measured, in words."""
        m, change = self._metrics, self._change
        assert change is not None
        norms = ", ".join(f"{name.removeprefix('grad_norm/')} {m[name]:.3g}" for name in m if name.startswith("grad_norm/"))
        clipped = "" if change.clipped is None else f", {change.clipped:.0%} clipped"
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in policy.rates.items())
        values = {
            "reference": references.note,
            "reward": f"{m['reward']:.3g} on average, {m['accuracy']:.1%} right" if "reward" in m else "no completion counts",
            "groups": f"{m.get('frac_reward_zero_std', 1):.0%} without a difference",
            "completions": f"{m.get('completions/clipped_ratio', 0):.0%} cut at max_new_tokens={policy.sampler.max_new_tokens}, "
            f"{m.get('completions/mean_length', 0):.1f} tokens on average",
            "agreement": f"sampling and training differ by {m.get('sampling/logp_difference/mean', 0):.1e} nats a token",
            "trial step": f"at the full rates ({rates}) KL {change.kl:.2g} nats a token, log-probabilities moved by "
            f"{change.moved:.2g}, ratio up to {change.ratio:.3g}{clipped}",
            "gradient": norms + ("" if any(m[name] for name in m if name.startswith("grad_norm/")) else ": exactly 0"),
            "time": self._time(policy, completions),
        }
        return values

    def _time(self, policy: PolicyModule, completions: int) -> str:
        """Seconds of a step, and of the run by what one completion takes."""
        m, schedule = self._metrics, policy.rollout_schedule
        made = (m.get("time/generate_s", 0.0) + m.get("time/reward_s", 0.0)) * self._steps_of_rollout(policy) / completions
        updated = m.get("time/update_s", 0.0) * schedule.minibatches_per_rollout / completions
        step = m.get("time/step_s", 0.0)
        text = f"about {step:.2g} s a step"
        if self.steps == float("inf"):
            return f"{text}; the run has no limit of steps"
        validated = len(getattr(policy.trainer.datamodule, "validation_prompts", [])) * (1 + policy.eval_samples)  # type: ignore[attr-defined]
        scoring = self.calibration_prompts * schedule.samples_per_prompt * (made + updated)
        total = self.steps * step + self.validations * validated * made + scoring
        return f"{text}, {_duration(total)} for {self.steps:.0f} steps, {self.validations:.0f} validations and scoring"

    @staticmethod
    def _steps_of_rollout(policy: PolicyModule) -> int:
        return policy.rollout_schedule.epochs_per_rollout * policy.rollout_schedule.minibatches_per_rollout


def _prompts(policy: PolicyModule, rollouts: Rollouts, rewards: Rewards, answers: list[str | None]) -> Iterator[str]:
    """Some prompts as tokenised, and completions with what the reward found in them and paid, by part."""
    samples, sequences = rollouts.samples_per_prompt, rollouts.sequences
    for number, prompt in enumerate(rollouts.prompts[:_PROMPTS]):
        row = number * samples
        ids = sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist()
        pieces = policy.tokenizer.convert_ids_to_tokens(ids)
        shown = " ".join(map(repr, pieces if len(pieces) <= 12 else [*pieces[:5], "...", *pieces[-6:]]))
        yield f"Prompt {number + 1}, {len(ids)} tokens, {prompt.place}, reference answer {_cut(prompt.answer)}"
        yield f"  {_cut(policy.tokenizer.decode(ids, skip_special_tokens=False))}"
        yield f"  tokens {shown}"
        for place in range(row, row + min(samples, _COMPLETIONS)):
            parts = ", ".join(f"{name} {float(part[place]):.3g}" for name, part in rewards.parts.items())
            paid = f"{float(rewards.total[place]):.3g} ({parts})"
            end = "" if rollouts.finished[place] else ", CUT"
            found = "no answer found" if answers[place] is None else f"found {_cut(answers[place], 100)}"
            yield f"  -> {_cut(str(rollouts.completions[place]))}"
            yield f"     {rollouts.completions[place].num_tokens} tokens{end}; {found}; paid {paid}"


def _tokens(policy: PolicyModule, rollouts: Rollouts) -> list[Finding]:
    """Whether prompts begin with the same special token twice, as where a template and the tokenizer both write it."""
    sequences = rollouts.sequences
    ids = sequences.prompt_ids[0][sequences.prompt_mask[0]].tolist()
    if len(ids) < 2 or ids[0] != ids[1] or ids[0] != policy.tokenizer.bos_token_id:
        return []
    text = f"prompts begin with {policy.tokenizer.bos_token!r} twice"
    return [Finding("tokens", text, "leave it out of data.format or model.chat_template")]


def memory_finding(needed: float, there: float, phase: str) -> list[Finding]:
    """Whether a run fits its device.

    Args:
        needed: Bytes that it takes at its peak.
        there: Bytes of the device.
        phase: When it takes most.
    """
    if needed <= there:
        return []
    text = f"the run takes {needed / 2**30:.1f} GiB while {phase}, and the device has {there / 2**30:.1f}"
    return [Finding("memory", text, "see what plan says takes most")]


def _cut(text: Any, length: int = _TEXT) -> str:
    shown = repr(text)
    return shown if len(shown) <= length else f"{shown[: length // 2]} ... {shown[-length // 2 :]}"


def _duration(seconds: float) -> str:
    """Example: 90 s, 12 min, 3.4 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
