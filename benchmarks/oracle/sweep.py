"""What is computed: every loss, advantage, correction, lag and step of the package, each as a line of a table."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracle.estimators import LossFunction, Probabilities, Rows, of_function, of_own_path, trl_loss
from benchmarks.oracle.world import STEP, Estimate, Language, Policy, Rollouts, Transformer, answers, wide
from hybrid_lightning import advantages, losses
from hybrid_lightning.losses import ImportanceCorrection, PolicyLoss

LOSSES: dict[str, Callable[[], PolicyLoss]] = {
    name: getattr(losses, f"{name}Loss")
    for name in ("GRPO", "DAPO", "DrGRPO", "BNPO", "GSPO", "GSPOToken", "CISPO", "SAPO", "DPPO")
}
ADVANTAGES = ("GroupMean", "LeaveOneOut", "Group", "BatchStd", "ReinforcePlusPlus", "PerReward")
CORRECTIONS = ("none", "TokenTruncation", "TokenMask", "SequenceTruncation", "SequenceMask")
OPTIONS: dict[str, Callable[[], PolicyLoss]] = {
    "GRPO, dual clip 3": lambda: losses.GRPOLoss(dual_clip=3.0),
    "GRPO, off-policy mask 0.1": lambda: losses.GRPOLoss(off_policy_mask_threshold=0.1),
    "DPPO, log-ratio 0.001": lambda: losses.DPPOLoss(log_ratio_coef=0.001),
    "GSPO, clip range 0.05": lambda: losses.GSPOLoss(clip_low=0.05, clip_high=0.05),
}
TRL_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "cispo", "sapo", "vespo")
LAGS = (0, 1, 4)  # steps between the weights that sampled a rollout and those before its first step
LATER = 2  # steps of training on a rollout that come before its "later" step
SAMPLES = 4  # G: with three, division by the deviation of rewards of 0 and 1 is division by a constant
SEEDS = 5
SIZES = (0.02, 0.05, STEP)


@dataclass(frozen=True)
class Line:
    """An estimator in one situation.

    Attributes:
        policy: "logits", "transformer" or "wide".
        rewards: "binary", "graded" or "failures" (the episodes of one completion fail).
        loss: A name of `LOSSES`, `OPTIONS`, TRL or a file.
        advantage: A name of `ADVANTAGES`; TRL's `scale_rewards`; empty for a function from a file.
        correction: A name of `CORRECTIONS`.
        lag: Of the sampler, in steps.
        step: "first" or "later" of the rollout.
        cut: "counted", or "masked": cut completions are left out.
        seed: Of the policy.
        samples: G.
        size: Nats by which a step of training changes log-probabilities, root mean square.
        estimate: What it gives.
        worth: Fresh completions with which an unbiased estimator without lag advances as far for its noise.
    """

    policy: str
    rewards: str
    loss: str
    advantage: str
    correction: str
    lag: int
    step: str
    cut: str
    seed: int
    samples: int
    size: float
    estimate: Estimate
    worth: float

    def values(self) -> dict[str, Any]:
        """Columns of the file of all lines."""
        values = asdict(self)
        return {**{name: value for name, value in values.items() if name != "estimate"}, **values["estimate"]}


class Situation:
    """A policy, what its completions earn, and its weights at other times.

    Args:
        policy: See `Line`.
        rewards: See `Line`.
        samples: G.
        seed: Of the policy.
        size: Of a step of training, in nats.
    """

    def __init__(self, policy: str, rewards: str, samples: int = SAMPLES, seed: int = 0, size: float = STEP) -> None:
        self.names = {"policy": policy, "rewards": rewards, "samples": samples, "seed": seed, "size": size}
        self.language: Language = wide() if policy == "wide" else answers(rewards == "graded", rewards == "failures")
        self.policy = (Transformer if policy == "transformer" else Policy)(self.language, seed)
        self.rollouts = Rollouts.of(self.language, samples)
        start, past = self.policy.start, {}
        for back in range(max(LAGS) + 1):
            past[back] = start
            start = self.policy.trained(start, -1, size)
        self.parameters = {"first": self.policy.start, "later": self.policy.trained(self.policy.start, LATER, size)}
        self.logprobs = {step: self.policy.logprobs(parameters) for step, parameters in self.parameters.items()}
        self.past = {lag: self.policy.logprobs(past[lag]) for lag in LAGS}

    @cached_property
    def truth(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each step the Jacobian of log-probabilities, [P, N, T, D], and the true gradient, [D]."""
        return {step: (self.policy.jacobian(of), self.policy.gradient(of)) for step, of in self.parameters.items()}

    @cached_property
    def _fresh(self) -> dict[str, float]:
        """Of each step the progress of one completion of an unbiased estimator that samples with these weights."""
        rows, found = Rows.of(self.language, self.rollouts, advantages.LeaveOneOutAdvantage()), {}
        for step, logprobs in self.logprobs.items():
            of_tokens = of_own_path(rows, losses.DrGRPOLoss(), Probabilities(logprobs, logprobs, logprobs))
            estimate = Estimate.of(of_tokens, self.rollouts.chances(logprobs), self.rollouts, *self.truth[step])
            found[step] = estimate.progress / self.rollouts.chosen[0].numel()
        return found

    def given(self, lag: int, step: str) -> Probabilities:
        """The policies of a step."""
        return Probabilities(self.logprobs[step], self.past[0], self.past[lag])

    def line(self, of_tokens: Tensor, lag: int, step: str, **names: Any) -> Line:
        """What gradients by token, [M, P, G, T], mean in a situation."""
        chances = self.rollouts.chances(self.past[lag])
        estimate = Estimate.of(of_tokens, chances, self.rollouts, *self.truth[step])
        names = {"correction": "none", "cut": "counted", **self.names, **names}
        return Line(**names, lag=lag, step=step, estimate=estimate, worth=estimate.progress / self._fresh[step])

    def own(self, loss: str | PolicyLoss, rows: Rows, lag: int, step: str, correction: str = "none", **names: Any) -> Line:
        """A line of this package, or of another class of loss."""
        made = None if correction == "none" else _correction(correction)
        used, loss = ({**LOSSES, **OPTIONS}[loss](), loss) if isinstance(loss, str) else (loss, type(loss).__name__)
        of_tokens = of_own_path(rows, used, self.given(lag, step), made, ahead=lag > 0)
        return self.line(of_tokens, lag, step, loss=loss, correction=correction, **names)

    def other(self, function: LossFunction, lag: int, step: str, **names: Any) -> Line:
        """A line of any other loss."""
        return self.line(of_function(function, self.language, self.rollouts, self.given(lag, step)), lag, step, **names)


def _correction(name: str) -> ImportanceCorrection:
    made: ImportanceCorrection = getattr(losses, name)()
    return made


def _advantage(name: str) -> advantages.AdvantageEstimator:
    made: advantages.AdvantageEstimator = getattr(advantages, f"{name}Advantage")()
    return made


def situations() -> list[tuple[int, str, str]]:
    """Lag, step and correction, all that differ: weights of 1 correct nothing."""
    return [(lag, step, of) for lag in LAGS for step in ("first", "later") for of in (CORRECTIONS if lag else CORRECTIONS[:1])]


def of_package(policy: str, rewards: str, advantage: str) -> list[Line]:
    """Every loss of the package with one estimator in every situation."""
    here = Situation(policy, rewards)
    rows = Rows.of(here.language, here.rollouts, _advantage(advantage))
    return [here.own(loss, rows, *of, advantage=advantage) for loss in LOSSES for of in situations()]


def of_options(policy: str) -> list[Line]:
    """Options of losses, with every lag and step."""
    here = Situation(policy, "binary")
    rows = Rows.of(here.language, here.rollouts, _advantage("Group"))
    return [here.own(loss, rows, lag, step, advantage="Group") for loss in OPTIONS for lag in LAGS for step in ("first", "later")]


def of_uncounted(policy: str) -> list[Line]:
    """Completions that are left out: cut ones, and those of episodes that fail."""
    found = []
    for rewards, cut in (("binary", "masked"), ("graded", "masked"), ("failures", "counted")):
        here = Situation(policy, rewards)
        for advantage in ("LeaveOneOut", "Group"):
            rows = Rows.of(here.language, here.rollouts, _advantage(advantage), mask_truncated=cut == "masked")
            found += [here.own(loss, rows, 0, "first", advantage=advantage, cut=cut) for loss in LOSSES]
    return found


def of_seeds_and_sizes() -> list[Line]:
    """Each loss with `GroupAdvantage`, with policies of several seeds and steps of several sizes."""
    found = []
    for seed, size in [*((seed, STEP) for seed in range(SEEDS)), *((0, size) for size in SIZES if size != STEP)]:
        here = Situation("logits", "binary", seed=seed, size=size)
        rows = Rows.of(here.language, here.rollouts, _advantage("Group"))
        for loss in LOSSES:
            for lag, step, of in (
                (0, "first", "none"),
                (0, "later", "none"),
                (4, "first", "none"),
                (4, "first", "TokenTruncation"),
            ):
                found.append(here.own(loss, rows, lag, step, of, advantage="Group"))
    return found


def of_wide() -> list[Line]:
    """Every loss on 341 completions, two of them in a group."""
    here = Situation("wide", "binary", samples=2)
    rows = Rows.of(here.language, here.rollouts, _advantage("LeaveOneOut"))
    return [here.own(loss, rows, 0, "first", advantage="LeaveOneOut") for loss in LOSSES]


def of_trl(loss_type: str) -> list[Line]:
    """A loss type of TRL, three completions in a group."""
    here = Situation("logits", "graded", samples=3)
    found = []
    for scale, lag, step in (
        ("none", 0, "first"),
        ("group", 0, "first"),
        ("batch", 0, "first"),
        ("group", 0, "later"),
        ("group", 4, "first"),
    ):
        found.append(here.other(trl_loss(loss_type, scale), lag, step, loss=f"TRL {loss_type}", advantage=scale))
    return found


def of_file(loss: LossFunction | PolicyLoss, name: str, samples: int) -> Iterator[Line]:
    """A loss of a user, beside the one without bias."""
    for policy, rewards in (("logits", "binary"), ("logits", "graded"), ("transformer", "binary")):
        here = Situation(policy, rewards, samples=samples)
        rows = Rows.of(here.language, here.rollouts, _advantage("LeaveOneOut"))
        for lag, step in ((0, "first"), (0, "later"), (4, "first")):
            yield here.own("DrGRPO", rows, lag, step, advantage="LeaveOneOut")
            if isinstance(loss, PolicyLoss):
                yield here.own(loss, rows, lag, step, advantage="LeaveOneOut")
            else:
                yield here.other(loss, lag, step, loss=name, advantage="")


def everything(processes: int, trl: bool, tell: Callable[[str], None]) -> list[Line]:
    """All lines of the page, by several processes of one thread."""
    small = ("logits", "transformer")
    work: list[Callable[[], list[Line]]] = [
        of_wide,
        *([partial(of_trl, name) for name in TRL_TYPES] if trl else []),
        of_seeds_and_sizes,
    ]
    work += [
        partial(of_package, *which) for which in ((p, r, a) for p in small for r in ("binary", "graded") for a in ADVANTAGES)
    ]
    work += [partial(of, policy) for of in (of_options, of_uncounted) for policy in small]
    found: list[Line] = []
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done, lines in enumerate(pool.map(_call, work), 1):
            found += lines
            tell(f"{done} of {len(work)} parts, {len(found)} estimators")
    return found


def _call(part: Callable[[], list[Line]]) -> list[Line]:
    return part()


def is_nothing(line: Line) -> bool:
    """Whether the mean gradient is 0."""
    return math.isnan(line.estimate.angle)
