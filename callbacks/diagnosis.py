"""`Diagnosis` and `Doctor` report what keeps a run from learning, during training and before it.

Findings from calibration and the first validation are printed before the first step; later problems are printed as soon as they
are seen. `reports/findings.py` defines what counts as a finding.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hybrid_lightning.callbacks.display import say
from hybrid_lightning.callbacks.progress import NORMS, logged_values
from hybrid_lightning.callbacks.rollouts import OncePerRollout, shown_text
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.metrics import Difference
from hybrid_lightning.reports import findings
from hybrid_lightning.reports.findings import Finding, PolicyChange, TrainingMonitor, worse
from hybrid_lightning.reports.references import has_paid, reference_answers, reference_rewards
from hybrid_lightning.reports.repeats import scored_again
from hybrid_lightning.reports.verdict import verdict
from hybrid_lightning.shared.explain import EXPLAIN
from hybrid_lightning.training.lightning_internals import ends_step
from hybrid_lightning.training.policy_module import PolicyModule
from hybrid_lightning.types import LossInputs, Rollout, Sequences, counted_groups

_REFERENCES, _ALL_REFERENCES = 8, 32  # reference answers tried before the first step, and by `Doctor`
_PROMPTS, _COMPLETIONS = 4, 2  # what `Doctor` shows: prompts, and completions per prompt
_ASKED = 32  # prompts that a teacher completes for `Doctor`
_ROWS = 64  # completions on which `Doctor` measures the change of the policy
_TEXT = 1_500  # characters of a prompt or completion that `Doctor` shows


class Diagnosis(OncePerRollout):
    """Reports what keeps a `PolicyModule` from learning, each finding once, with its remedy and a section of the docs.

    Before the first step: completions of calibration (or of the first rollout) and of the first validation that are cut or all
    earn the same reward, and reference answers for which the reward pays nothing. Later: rollouts without a gradient, a reward
    that falls below its start, a policy with a collapsing ratio or entropy. The run summary ends with `verdict`.
    """

    def __init__(self) -> None:
        self.found: dict[str, Finding] = {}  # reported findings by kind: each kind once
        self._monitor: TrainingMonitor | None = None
        self._begun = False
        self._cut = True  # whether completions were cut at the last validation

    # ---- before the first step

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the first validation."""
        if isinstance(pl_module, PolicyModule) and pl_module.task.generation.episodes is None:
            self._say(trainer, *_cut_in_validation(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the validation still shows."""
        if isinstance(pl_module, PolicyModule):
            self._cut = bool(_cut_in_validation(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the completions of calibration, if there are any."""
        if not isinstance(pl_module, PolicyModule) or not trainer.is_global_zero:
            return
        calibration, pl_module.task.last_calibration = pl_module.task.last_calibration, None
        if calibration is not None and not self._begun:
            self._begin(trainer, pl_module, calibration, "the calibration")

    def _begin(self, trainer: Trainer, policy: PolicyModule, rollout: Rollout, where: str) -> None:
        """Look at the first available completions, and score reference answers with the reward."""
        self._begun = True
        credited, limits = policy.task.credit(rollout), policy.task.generation.limits
        self._say(trainer, *findings.of_rollout(rollout, where, limits, credited))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = getattr(data, "train_prompts", None)
        if prompts:
            generation, validated = policy.task.generation, policy.evaluation.last.get("", {})
            pays = has_paid(generation, rollout) or validated.get(f"avg@{policy.task.evaluation.samples}", 0.0) > 0
            references = reference_rewards(generation, prompts, getattr(data, "format", None), _REFERENCES, pays)
            self._say(trainer, *reference_answers(prompts, _accuracy(rollout)).findings, *references.findings)

    # ---- in training

    def on_rollout(self, trainer: Trainer, batch: Any) -> None:
        """Look at a rollout."""
        policy, rewards = trainer.lightning_module, batch.rollout.scored
        if not isinstance(policy, PolicyModule) or not trainer.is_global_zero:
            return
        if not self._begun:
            self._begin(trainer, policy, batch.rollout, "the first rollout")
        groups = counted_groups(rewards.total, rewards.counted)
        if not groups:
            return
        means = torch.cat([rewards.total.flatten()[numbers].mean(dim=1) for numbers in groups])
        spread = float(means.std()) if len(means) > 1 else 0.0
        self._say(trainer, *self._monitored(policy).add_rollout(batch.metrics, float(rewards.of_counted().total.min()), spread))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at an optimizer step."""
        if isinstance(pl_module, PolicyModule) and trainer.is_global_zero and ends_step(trainer):
            self._say(trainer, *self._monitored(pl_module).add_step(logged_values(trainer, ("entropy", "ratio/mean", *NORMS))))

    def _monitored(self, policy: PolicyModule) -> TrainingMonitor:
        self._monitor = self._monitor or TrainingMonitor(policy.task.schedule.prompts_per_rollout)
        return self._monitor

    def _say(self, trainer: Trainer, *found: Finding) -> None:
        policy = trainer.lightning_module
        unneeded = _unneeded(policy) if isinstance(policy, PolicyModule) else ()
        for finding in found:
            if finding.level != "note" and finding.kind not in (*self.found, *unneeded):
                self.found[finding.kind] = finding
                if trainer.is_global_zero:
                    say(f"Warning: {finding}")

    def state_dict(self) -> dict[str, Any]:
        """Findings and observations so far, so that a resumed run continues from there."""
        found = {kind: vars(finding) for kind, finding in self.found.items()}
        return {
            **super().state_dict(),
            "begun": self._begun,
            "cut": self._cut,
            "found": found,
            "monitor": self._monitor and vars(self._monitor),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._begun, self._cut = state_dict["begun"], state_dict.get("cut", True)
        self.found = {kind: Finding(**found) for kind, found in state_dict["found"].items()}
        self._monitor = state_dict["monitor"] and TrainingMonitor(**state_dict["monitor"])

    # ---- at the end

    def verdict(
        self,
        accuracy: Difference | None,
        reward: Difference | None,
        losses: tuple[float, float] | None,
        one_answer: str = "",
        unequal: str = "",
        doubt: str = "",
    ) -> tuple[str, list[str]]:
        """Whether the policy has learned, and what to try (see `reports.verdict`).

        `losses` are the losses on held-out examples before and after training; they decide if nothing else was measured.
        `one_answer` states that most problems get the same answer at the end (see `most_frequent`), and `unequal` that most rows
        have it (see `unequal_rows`). One answer is the verdict, except for a policy that fell or moved too far: the rates then
        come before the data. A `doubt` about the rollout engine's weights (see `Generation.doubt`) comes before everything else.
        """
        text, direction = verdict(accuracy, reward)
        if direction is None and losses is not None:
            direction = (losses[1] < losses[0]) - (losses[1] > losses[0])
            said = ("no change", "learned", "worse than at the start")[direction]
            text = f"{said}: held-out loss {losses[0]:.4f} -> {losses[1]:.4f}"
        kept = {kind: finding for kind, finding in self.found.items() if kind not in self._gone(direction == 1)}
        if doubt:
            finding = findings.of_engine(doubt)
            return finding.text, [finding.advice, *(each.advice for each in kept.values())]
        moved = kept.pop("worse", None)
        fell = reward is not None and reward.direction < 0
        if moved is None and direction == -1 and (fell or one_answer or not kept):
            moved = worse("")
        tries = [finding.advice for finding in kept.values()]
        if self._monitor is not None and 0 < self._monitor.steps == self._monitor.idle:
            paid = self._monitor.constant
            why = "" if paid is None else f", since every completion earned {paid:.3g}"
            return f"nothing was learned: no step had a gradient{why}", tries
        if one_answer and (moved is None or (unequal and direction != -1)):  # a policy that fell was not paid for its answer
            rows = f"give about the same number of rows for each answer ({unequal}), and " if unequal else ""
            tries.insert(0, Finding("one", one_answer, f"{rows}see that the reward does not pay for one answer").advice)
        if moved is not None:
            return f"{text}; {one_answer}" if one_answer else text, [moved.advice, *tries]
        if not tries and direction == 0:
            tries = [f"train longer, or raise the rates ({EXPLAIN} the-reward-does-not-move)"]
        return one_answer or text, tries

    def _gone(self, learned: bool) -> set[str]:
        """Kinds of findings that no longer hold at the end of the run."""
        gone = {"worse", "reference"} if learned else set()
        gone |= set() if self._cut else {"cut"}
        learnable = self._monitor is not None and self._monitor.rollouts and not self._monitor.equal
        return gone | {"equal", "gradient"} if learnable else gone


def _cut_in_validation(policy: PolicyModule) -> list[Finding]:
    """Whether completions of the last validation are cut; for episodes, which also end for other reasons, greedy ones."""
    evaluation, limits = policy.evaluation, policy.task.generation.limits
    if policy.task.generation.episodes is not None:
        greedy = [] if evaluation.greedy is None else findings.of_rollout(evaluation.greedy, "the validation", limits)
        return [finding for finding in greedy if finding.kind == "cut"]
    values = evaluation.last.get("", {})
    share, right = values.get("truncation_rate", 0.0), values.get(f"avg@{policy.task.evaluation.samples}")
    wrong = None if right is None else share - right  # at least this share
    return findings.of_cut(share, wrong, "the first validation", limits)


class Doctor(Callback):
    """Examines a `PolicyModule` in a `fit` of one optimizer step.

    The rollout and the step are the same as in training, at the full learning rates. Nothing is written (see `Trainer.doctor`).

    Attributes:
        found: The findings of the first rank.
    """

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self._rollout: Rollout | None = None  # the step's rollout
        self._before: tuple[Sequences, Tensor] | None = None  # completions, and their log-probabilities before the step
        self._differs = False  # whether any group of the step has a difference: one minibatch may have none by chance
        self._change: PolicyChange | None = None
        self._metrics: dict[str, float] = {}
        self._taught: tuple[float, float] | None = None  # accuracy of teacher and policy on the same prompts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the step have the full learning rates, whatever the schedule."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the policy on some completions before the step."""
        assert isinstance(pl_module, PolicyModule)
        self._differs = self._differs or bool(batch.advantages.any())
        if self._before is None:
            self._rollout = rollout = batch.rollout
            sequences = pl_module.task.rows_of_loss(rollout).rows(slice(0, _ROWS))
            self._before = sequences, _logprobs(pl_module, sequences)
            if (teacher := pl_module.task.teaching.teacher) is not None and not teacher.is_remote:
                generation, asked = pl_module.task.generation, rollout.prompts[:_ASKED]
                right = _accuracy(generation.score(teacher.complete(generation, pl_module.task.passes, asked)))
                own = rollout.scored.correct[: len(asked)].float().mean()
                self._taught = None if right is None else (right, float(own))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure the policy again after the step; all ranks compute, since each may hold part of the model."""
        if not ends_step(trainer):
            return
        assert isinstance(pl_module, PolicyModule) and self._before is not None
        sequences, before = self._before
        after, mask = _logprobs(pl_module, sequences), sequences.sampled_mask
        advantages = batch.rollout.of_rows(batch.rollout.mean_advantages)[: len(mask)]
        reference = before if pl_module.task.loss.needs_reference else None
        entropy = torch.zeros_like(after) if pl_module.task.loss.needs_entropy else None
        length = float(pl_module.task.generation.max_completion_tokens)
        inputs = LossInputs(after, advantages, mask, before, reference, entropy=entropy, max_completion_tokens=length)
        with torch.no_grad():
            measured = pl_module.task.loss(inputs).metrics
        self._change = PolicyChange.between(before, after, mask, measured)
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    # ---- report

    def report(self, policy: PolicyModule, data: PromptDataModule, steps: float, validations: int, scored_prompts: int) -> None:
        """Print everything that was seen, and collect the findings.

        `steps` is the number of optimizer steps of the intended run, infinite without a limit. `validations` is its number of
        validations, including the one before training. Completions of `scored_prompts` prompts score its modules, 0 if it does
        not score.
        """
        assert self._rollout is not None and self._change is not None
        rollout, m, change = self._rollout, self._metrics, self._change
        answers = policy.task.generation.answers(rollout)
        for line in _prompts(policy, rollout, answers):
            say(line)
        generation, prompts, accuracy = policy.task.generation, data.train_prompts, _accuracy(rollout)
        limits, pays = generation.limits, has_paid(generation, rollout)
        references = reference_rewards(generation, prompts, data.format, _ALL_REFERENCES, pays)
        given, (repeated, differing) = reference_answers(prompts, accuracy), scored_again(generation, rollout)
        norms = {name.removeprefix("grad_norm/"): value for name, value in m.items() if name.startswith("grad_norm/")}
        rates = ", ".join(f"{name} {policy.rates[name]:.3g}" for name in norms)
        clipped = "" if change.clipped is None else f", {change.clipped:.0%} clipped"
        validated = len(data.validation_prompts) * (1 + policy.task.evaluation.samples) * validations
        counted = f"{len(rollout.scored.of_counted().total)} completions"
        counted = f" of {counted}" if accuracy is None else f", {accuracy:.1%} of {counted} right"
        values = {
            "answers": given.note,
            "reference": references.note,
            "reward": f"{m['reward']:.3g} on average{counted}" if "reward" in m else "no completion counts",
            "repeated": repeated,
            "groups": f"{m.get('frac_reward_zero_std', 1):.0%} have equal rewards and teach nothing",
            "completions": f"{m.get('completions/mean_length', 0):.1f} tokens on average, "
            f"{rollout.cut.float().mean():.0%} cut at {findings.as_options(limits)}",
            "agreement": f"sampling and training differ by {m.get('sampling/logp_difference/mean', 0):.1e} nats a token",
            "gradient": "norm " + ", ".join(f"{value:.3g} ({name})" for name, value in norms.items()),
            "trial step": f"at the full rates ({rates}): KL {change.kl:.2g} nats a token, log-probabilities moved by "
            f"{change.moved:.2g}, ratio up to {change.ratio:.3g}{clipped}",
            "time": self._time(policy, steps, validated, scored_prompts * rollout.group_size, len(rollout.completions)),
        }
        if policy.task.teaching.teacher is not None:
            right = "" if self._taught is None else "{:.0%} right, and the policy {:.0%}; ".format(*self._taught)
            values["teacher"] = f"{right}KL from it {m.get('teacher/kl', 0.0):.2g} nats a token"
            self.found += [] if self._taught is None else findings.of_teacher(*self._taught)
        if not any(norms.values()):
            values["trial step"] = "not possible without a gradient"
        for name, text in values.items():
            say(f"{name:<16}{text}")
        self.found += [*given.findings, *references.findings, *differing, *_tokens(policy, rollout)]
        found = findings.of_rollout(rollout, "the rollout", limits, policy.task.credit(rollout))
        self.found += [finding for finding in found if finding.kind not in _unneeded(policy)]
        self.found += findings.of_answers(answers) if policy.task.generation.episodes is None else []
        self.found += findings.of_gradient(norms, equal=not self._differs)
        precision = str(policy.trainer.precision)
        self.found += findings.of_agreement(m.get("sampling/logp_difference/mean", 0.0), precision)
        self.found += findings.of_change(change, steps, precision) if any(norms.values()) else []

    def _time(self, policy: PolicyModule, steps: float, validated: int, scored: int, completions: int) -> str:
        """Seconds of a step, and of the run, estimated from the time per completion of the rollout."""
        m, schedule = self._metrics, policy.task.schedule
        step, minibatches = m.get("time/step_s", 0.0), schedule.minibatches_per_rollout
        made = (m.get("time/generate_s", 0.0) + m.get("time/reward_s", 0.0)) * minibatches * schedule.epochs_per_rollout
        updated = m.get("time/update_s", 0.0) * minibatches
        if math.isinf(steps):
            return f"about {step:.3g} s a step; the run has no limit of steps"
        total = steps * step + (validated * made + scored * (made + updated)) / completions
        return f"about {step:.3g} s a step, {_duration(total)} for {steps:.0f} steps with validation and scoring"


def _unneeded(policy: PolicyModule) -> tuple[str, ...]:
    """Kinds of findings that do not count with a teacher, from which a policy learns even where rewards do not differ."""
    return () if policy.task.teaching.teacher is None else ("equal", "gradient")


def _accuracy(rollout: Rollout) -> float | None:
    """Share of right completions among the counted ones, 0 if there are none; None if nothing measures correctness."""
    right = rollout.scored.of_counted().correct
    return None if not rollout.scored.measures_correctness else float(right.float().mean()) if len(right) else 0.0


def _logprobs(policy: PolicyModule, sequences: Sequences) -> Tensor:
    ((logprobs, _, _),) = policy.task.passes.measure([sequences])
    assert logprobs is not None
    return logprobs


def _prompts(policy: PolicyModule, rollout: Rollout, answers: list[str | None]) -> Iterator[str]:
    """Some prompts as tokenised, each with completions, the answers found in them, and their rewards by part."""
    sequences, rewards = rollout.sequences, rollout.scored
    for number, prompt in enumerate(rollout.prompts[:_PROMPTS]):
        first = number * rollout.group_size
        row = rollout.first_row(first)
        ids = sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist()
        pieces = policy.tokenizer.convert_ids_to_tokens(ids)
        shown = " ".join(map(repr, pieces if len(pieces) <= 12 else [*pieces[:5], "...", *pieces[-6:]]))
        count = f"{len(ids)} token{'s' * (len(ids) > 1)}"
        yield f"Prompt {number + 1}, {count}, {prompt.place}, reference answer {_cut(prompt.answer)}"
        yield f"  {_cut(policy.tokenizer.decode(ids, skip_special_tokens=False))}"
        yield f"  tokens {shown}"
        for sample in range(min(rollout.group_size, _COMPLETIONS)):
            parts = ", ".join(f"{name} {float(part[number, sample]):.3g}" for name, part in rewards.parts.items())
            paid = f"paid {float(rewards.total[number, sample]):.3g} ({parts})" if rewards.counts(number, sample) else "left out"
            completion, answer = rollout.completions[first + sample], answers[first + sample]
            found = "no answer found" if answer is None else f"found {_cut(answer, 100)}"
            if completion.episode is None:
                yield f"  -> {_cut(str(completion))}"
            else:
                yield "  -> " + shown_text(completion).replace("\n", "\n     ")
                found = f"{completion.episode.turns} turn{'s' * (completion.episode.turns > 1)}"
            yield f"     {completion.num_tokens} tokens{', CUT' if completion.is_cut else ''}; {found}; {paid}"
            for term in policy.task.generation.reward_terms():
                if (why := term.explain(completion, prompt)) is not None:
                    yield f"     {term.name}: {_cut(' '.join(why.split()))}"


def _tokens(policy: PolicyModule, rollout: Rollout) -> list[Finding]:
    """Check whether prompts begin with the same special token twice, as when a template and the tokenizer both write it."""
    ids, begin = rollout.sequences.prompt_ids[0][rollout.sequences.prompt_mask[0]].tolist(), policy.tokenizer.bos_token_id
    if begin is None or ids[:2] != [begin, begin]:
        return []
    text = f"prompts begin with {policy.tokenizer.bos_token!r} twice"
    return [Finding("tokens", text, "leave it out of data.format or model.chat_template")]


def _cut(text: Any, length: int = _TEXT) -> str:
    shown = repr(text)
    return shown if len(shown) <= length else f"{shown[: length // 2]} ... {shown[-length // 2 :]}"


def _duration(seconds: float) -> str:
    """A duration as text, such as 90 s, 12 min or 3.4 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
