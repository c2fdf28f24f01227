"""Findings: problems that keep a run from learning, each with its remedy and the section on it that the command `explain` prints.

`doctor` looks for them before a run, and `Diagnosis` during a run. The functions here turn measurements into findings and hold
the thresholds; the docs give the reasons for them. No function communicates with other ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hybrid_lightning.losses import functional as F
from hybrid_lightning.shared.explain import EXPLAIN
from hybrid_lightning.types import Rewards, Rollout, equal_groups

SECTIONS = {  # finding -> its section of docs/troubleshooting.md; the first finding explains the later ones
    "engine": "vllm",
    "large": "a-step-is-too-large",
    "copy": "the-answer-is-in-the-prompt",
    "judge": "the-rewards-server-fails",
    "repeat": "the-reward-is-not-repeatable",
    "reference": "the-reference-answer-earns-nothing",
    "accident": "wrong-answers-are-paid",
    "tokens": "the-prompt-is-not-what-it-seems",
    "cut": "completions-are-cut",
    "answers": "the-reward-finds-no-answer",
    "teacher": "the-teacher-is-not-better",
    "equal": "all-rewards-of-a-group-are-equal",
    "gradient": "no-gradient",
    "small": "a-step-is-too-small",
    "worse": "the-policy-gets-worse",
    "agreement": "sampling-and-training-disagree",
    "constant": "one-answer-is-right-for-most-rows",
    "one": "one-answer-to-most-problems",
    "memory": "out-of-memory",
}
_CUT = 0.5  # share of completions that are cut and wrong
_EQUAL = 0.9  # share of groups without a difference
_NO_ANSWER = 0.9  # share of completions in which the reward finds no answer
_MAX_KL = 0.4  # nats per token: above it the embedded policy learned less or collapsed (docs/troubleshooting.md)
_MIN_CHANGE = 0.1  # of a log-probability, in nats, over a whole run
_AGREEMENT, _AGREEMENT_HALF = 1e-3, 0.1  # nats per token, with products in float32 and in 16 bits (docs/troubleshooting.md)


@dataclass(frozen=True)
class Finding:
    """One finding."""

    kind: str  # a key of `SECTIONS`
    text: str  # the observation
    remedy: str  # the remedy
    # "error": the run cannot learn; "warning": it may learn little; "note": reported only by `doctor`.
    level: Literal["error", "warning", "note"] = "warning"

    @property
    def advice(self) -> str:
        """The remedy, and where to read more about it."""
        return f"{self.remedy} ({EXPLAIN} {SECTIONS[self.kind]})"

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


def cause(found: Iterable[Finding]) -> Finding | None:
    """The finding that explains the others, such as a reward that pays for any answer; None if there are only notes."""
    order = list(SECTIONS)
    grave = [finding for finding in found if finding.level != "note"]
    return min(grave, key=lambda finding: order.index(finding.kind), default=None)


def of_rollout(rollout: Rollout, where: str, limits: Mapping[str, int], credited: Rewards | None = None) -> list[Finding]:
    """Findings about this rank's completions and rewards: whether there is something to learn, and whether completions are cut.

    `where` names the completions, such as "the first rollout"; `limits` are the limits on their length (see `Generation.limits`).
    Advantages are estimated from `credited` (see `RLTask.credit`), or else from the rewards.
    """
    rewards = rollout.scored
    own, credited = rewards.of_counted(), rewards if credited is None else credited
    if not len(own.total):
        return []
    equal_in_turns = equal_groups(credited.total, credited.counted).view(len(rollout.prompts), -1).all(dim=1)
    some_count = slice(None) if rewards.counted is None else rewards.counted.any(dim=1)
    equal = equal_in_turns[some_count].double().mean().item()
    cut = rollout.cut.flatten() if rewards.counted is None else rollout.cut[rewards.counted]
    wrong = (cut & ~own.correct).float().mean().item() if own.measures_correctness else None
    found = of_cut(cut.float().mean().item(), wrong, where, limits)
    if equal < _EQUAL:
        return found
    text = f"in {equal:.0%} of the groups of {where} all completions earn the same, so nothing is learned from them"
    if equal == 1 and own.total.max() == own.total.min():
        text = f"all {len(own.total)} completions of {where} earn the same, {own.total[0]:.3g}: there is nothing to learn from"
    remedy = (
        "give harder problems, or a reward that does not pay for everything"
        if own.correct.all()
        else "check that the reward finds the answers, give easier problems, or raise samples_per_prompt"
    )
    return [Finding("equal", text, remedy, "error" if equal == 1 else "warning"), *found]


def of_cut(share: float, wrong: float | None, where: str, limits: Mapping[str, int]) -> list[Finding]:
    """Whether completions are cut before they are right, from the share that is cut and the share that is cut and `wrong`.

    `wrong` is None if nothing measures whether completions are right.
    """
    if (share if wrong is None else wrong) < _CUT:
        return []
    cut = f"{share:.0%} of the completions of {where} are cut at {as_options(limits)}"
    remedy = f"raise {' or '.join(limits)}, or end completions with sampler.stop"
    return [Finding("cut", cut if wrong is None else f"{cut}, {wrong:.0%} before they are right", remedy)]


def as_options(limits: Mapping[str, int]) -> str:
    """Example: `max_new_tokens=12 or max_tokens=48`."""
    return " or ".join(f"{name.rpartition('.')[2]}={value}" for name, value in limits.items())


def of_answers(answers: Sequence[str | None]) -> list[Finding]:
    """Whether the reward finds answers in completions, right or wrong."""
    missing = sum(answer is None for answer in answers) / max(1, len(answers))
    if missing < _NO_ANSWER:
        return []
    text = f"the reward finds no answer in {missing:.0%} of {len(answers)} completions"
    return [Finding("answers", text, "let the prompt require the form that the reward expects, or change the reward's pattern")]


def of_agreement(difference: float, precision: str) -> list[Finding]:
    """Whether sampling and training agree, from the mean of |l_train - l_sample| over tokens, in nats.

    `precision` is the Trainer's: under `bf16-mixed`, products round float32 weights to 16 bits.
    """
    most = _AGREEMENT if precision == "32-true" else _AGREEMENT_HALF
    if not difference > most:
        return []
    text = f"log-probabilities of sampling and training differ by {difference:.2g} nats, more than {most:g}"
    return [Finding("agreement", text, "set model.correction=TokenTruncation, or sample and train in float32")]


def of_engine(doubt: str) -> Finding:
    """That a rollout engine may not have the policy's weights, and why (see `Generation.doubt`)."""
    remedy = "start the engine again with the policy's model and dtype, and resume from a checkpoint before that"
    return Finding("engine", f"completions were made by other weights than the policy's: {doubt}", remedy)


@dataclass(frozen=True)
class PolicyChange:
    """How one optimizer step changed the policy, on completions that the policy sampled before the step."""

    kl: float  # nats per token, from the policy before the step to the policy after it, k3
    moved: float  # mean of the absolute change of a token's log-probability, in nats
    ratio: float  # largest ratio in the loss: of tokens, or of sequences
    clipped: float | None  # share that the loss clips; None if it does not clip

    @classmethod
    def between(cls, before: Tensor, after: Tensor, mask: Tensor, metrics: Mapping[str, Tensor]) -> "PolicyChange":
        """Compare log-probabilities before and after the step, [B, T], on the sampled tokens (`mask`, [B, T]).

        `metrics` are the loss's measurements for the same log-probabilities.
        """
        tokens = mask.sum().clamp(min=1)
        moved = F.log_ratio(after, before, mask).abs().sum() / tokens
        kl = (F.k3_kl(before, after, mask) * mask).sum() / tokens
        clipped = metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio"))
        return cls(float(kl), float(moved), float(metrics["ratio/max"]), None if clipped is None else float(clipped))


def of_change(change: PolicyChange, steps: float, precision: str) -> list[Finding]:
    """Whether the learning rates fit, from the change in one step at the full rates.

    `steps` is the length of the run, infinite without a limit. `precision` is the Trainer's. Rounding to 16 bits alone is a
    KL of less than 1e-3, and may hide a step entirely.
    """
    if change.kl > _MAX_KL or not math.isfinite(change.kl):
        text = f"one step changes the policy by {change.kl:.2g} nats per token (KL), more than {_MAX_KL:g}"
        remedy = "lower model.lr_lora and model.lr_full, at first to a third; a higher adapter.rank needs lower rates"
        return [Finding("large", text, remedy)]
    if not change.moved * steps < _MIN_CHANGE:
        return []
    text = (
        f"one step moves log-probabilities by {change.moved:.1g} nats: {steps:.0f} steps in one direction would not change a "
        f"probability by {_MIN_CHANGE:.0%}"
    )
    remedy = "raise model.lr_lora and model.lr_full, at first tenfold"
    return [Finding("small", text, remedy, "error" if change.moved == 0 and precision == "32-true" else "warning")]


def of_gradient(norms: Mapping[str, float], equal: bool) -> list[Finding]:
    """Whether there is a gradient, from the norms of the parameter groups before clipping.

    If the rewards in each group of the step are `equal`, 0 is expected; for a whole rollout, another finding reports that.
    """
    if equal or not norms or any(norms.values()):
        return []
    return [Finding("gradient", "the gradient is exactly 0 although rewards differ", "check the loss, if it is yours", "error")]


def of_teacher(accuracy: float, of_policy: float) -> list[Finding]:
    """Whether a teacher is better than the policy, from their accuracies on the same prompts."""
    if accuracy > of_policy:
        return []
    text = f"the teacher gets {accuracy:.0%} right and the policy {of_policy:.0%}, so the teacher has little to teach"
    return [Finding("teacher", text, "use a better teacher, or give SelfTeacher more context")]


def of_memory(needed: float, there: float, phase: str) -> list[Finding]:
    """Whether a run fits its device: bytes `needed` at its peak, bytes `there`, and the phase of the peak."""
    if needed <= there:
        return []
    text = f"the run needs {needed / 2**30:.1f} GiB while {phase}, and the device has {there / 2**30:.1f}"
    return [Finding("memory", text, "run plan to see what takes most")]


@dataclass
class TrainingMonitor:
    """Watches rollouts and steps of a run for problems since its start."""

    groups: int  # groups in each rollout, over all devices
    window: int = 0  # rollouts to look at together: at least 3, with at least 24 groups
    rollouts: list[dict[str, float]] = field(default_factory=list)  # the first and the latest ones, at most twice the window
    entropy: float | None = None  # entropy at the first step
    idle: int = 0  # steps in a row with gradient 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.window = max(3, -(-24 // self.groups))

    @property
    def constant(self) -> float | None:
        """The reward that every completion in the kept rollouts has; None if there are no rollouts, or if rewards differ."""
        paid = [value for row in self.rollouts for value in (row["worst"], row["reward"])]
        return paid[0] if paid and max(paid) - min(paid) <= 1e-6 * max(1.0, abs(paid[0])) else None

    @property
    def equal(self) -> bool:
        """Whether the last rollouts had nothing to learn from, although not all problems were solved."""
        last = self.rollouts[-self.window :]
        return sum(row["equal"] for row in last) >= _EQUAL * len(last) and not all(row["solved"] == 1 for row in last)

    def add_rollout(self, metrics: Mapping[str, float], worst: float, spread: float) -> list[Finding]:
        """Add a rollout: its logged metrics, its lowest reward, and the standard deviation of its groups' mean rewards."""
        if "reward" not in metrics:  # no completion counts
            return []
        solved = metrics.get("solve_rate/all", float(worst >= 1))  # absent where nothing measures correctness
        row = {"worst": worst, "spread": spread, "solved": solved}
        row |= {"reward": metrics["reward"], "equal": metrics["frac_reward_zero_std"]}
        if len(self.rollouts) == 2 * self.window:
            del self.rollouts[self.window]
        self.rollouts.append(row)
        if len(self.rollouts) < self.window:
            return []
        last, start = self.rollouts[-self.window :], self.rollouts[: self.window]
        if all(entry["equal"] == 1 for entry in last):
            if all(entry["solved"] == 1 for entry in last):
                return []  # a policy that solves every problem is fine
            if fallen := self._fallen(self.rollouts[: -self.window][: self.window], last):
                return [worse(f"{fallen}, where the completions of each prompt earn the same")]
            text = (
                f"nothing is learned from the last {self.window} rollouts: the completions of each prompt earn the same, "
                f"{metrics['reward']:.3g} on average"
            )
            return [Finding("gradient", text, "stop, and run doctor to see completions and the answers that the reward found")]
        fallen = self._fallen(start, last) if len(self.rollouts) == 2 * self.window else ""
        return [worse(fallen)] if fallen else []

    def _fallen(self, start: list[dict[str, float]], last: list[dict[str, float]]) -> str:
        """Whether the reward fell by half of its mean and by more than 4 standard errors, as text; "" if it did not."""
        if not start:
            return ""
        before, now = (sum(entry["reward"] for entry in some) / len(some) for some in (start, last))
        floor, spread = min(entry["worst"] for entry in start), sum(entry["spread"] for entry in start) / len(start)
        error = math.sqrt((1 / len(start) + 1 / len(last)) / self.groups) * spread
        if now - floor < 0.5 * (before - floor) and before - now > 4 * error:
            first = f"first {len(start)} rollouts" if len(start) > 1 else "first rollout"
            return f"the reward fell from {before:.3g} in the {first} to {now:.3g} in the last {len(last)}"
        return ""

    def add_step(self, metrics: Mapping[str, float]) -> list[Finding]:
        """Add an optimizer step by its logged metrics."""
        self.steps += 1
        norms = [value for name, value in metrics.items() if name.startswith("grad_norm/")]
        self.idle = 0 if any(norms) or not norms else self.idle + 1
        entropy, ratio = metrics.get("entropy"), metrics.get("ratio/mean", 1.0)
        self.entropy = entropy if self.entropy is None else self.entropy
        if not 0.5 < ratio < 2:
            return [worse(f"the policy has drifted from the one that sampled: the mean ratio is {ratio:.3g}, not about 1")]
        if entropy is None or not self.entropy or not self.rollouts:  # a run may resume in the middle of its first rollout
            return []
        start, now = (sum(row["reward"] for row in some) / len(some) for some in (self.rollouts[:3], self.rollouts[-3:]))
        if entropy < 0.02 * self.entropy and now <= start:
            return [worse(f"the entropy fell from {self.entropy:.2g} to {entropy:.2g} while the reward did not rise")]
        return []


def worse(text: str) -> Finding:
    """The finding that the policy gets worse, with the reason."""
    return Finding("worse", text, "lower model.lr_lora and model.lr_full, and resume from an earlier checkpoint")
