"""Evaluation: what a policy makes of held-out prompts, and how well it predicts held-out examples.

Axes: P prompts, n sampled completions of each in prompt-major order; E examples.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from hybrid_lightning.metrics import ProblemMeans, completion_draws, completion_values
from hybrid_lightning.policy.prompts import PromptEncoder
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt, Rewards, Rollouts

Answers = Sequence[str | None]


class EvaluationMetrics(nn.Module):
    """The metrics of one evaluation, of greedy completions and of n sampled ones.

    Args:
        samples: n.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.means = ProblemMeans({"greedy_accuracy": 1, "greedy_reward": None, **completion_draws(samples)})

    def update(self, greedy: tuple[Rollouts, Rewards], sampled: tuple[Rollouts, Rewards], answers: Answers) -> None:
        """Add the prompts of one batch.

        Args:
            greedy: P completions, one for each prompt.
            sampled: P * n completions of the same prompts.
            answers: What each of the P * n completions answers, None for nothing.
        """
        rollouts, rewards = sampled
        shape = (len(rollouts.prompts), rollouts.samples_per_prompt)
        lengths = rollouts.sequences.completion_mask.sum(dim=1)
        correct = rewards.correct.view(shape)
        values = completion_values(
            correct,
            [answers[start : start + shape[1]] for start in range(0, len(answers), shape[1])],
            rewards.total.view(shape),
            lengths.view(shape),
            rollouts.finished.view(shape),
        )
        values |= {"greedy_accuracy": greedy[1].correct, "greedy_reward": greedy[1].total}
        index = torch.tensor([prompt.index for prompt in rollouts.prompts], device=lengths.device)
        self.means.update([prompt.set_name for prompt in rollouts.prompts], index, values)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Set -> name -> value, "" for all sets together (see `ProblemMeans`).

        The names: `problems`, `greedy_accuracy`, `greedy_reward`, `avg@n`, `pass@k`, `maj@k`, `reward`, `completion_length`,
        `truncation_rate`, and the ends of confidence intervals.
        """
        return self.means.compute()

    def names(self, sets: Collection[str]) -> dict[str, list[str]]:
        """Set -> names, as `compute` will give them for problems of these sets."""
        return self.means.names(sets)

    def reset(self) -> None:
        """Forget all prompts."""
        self.means.reset()


class ExampleMetrics(Metric):
    """Means over examples, each counted once by its index, however many ranks have seen it (as in `ProblemMeans`)."""

    full_state_update = False
    is_differentiable = False

    index: list[Tensor]
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names: list[str] = []  # of the columns behind the first, which is the weight
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, weights: Tensor, terms: dict[str, Tensor]) -> None:
        """Add examples.

        Args:
            index: [E] int64, what identifies each.
            weights: [E], what each counts.
            terms: Name -> [E], what each adds; the same names every time.
        """
        self.names = list(terms)
        self.index.append(index.long())
        self.rows.append(torch.stack([weights.double(), *(value.double() for value in terms.values())], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Name -> sum of the terms / sum of the weights, float32; nothing if there was no example."""
        if len(self.index) == 0:  # a list, or a tensor once ranks have been gathered
            return {}
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        _, inverse = index.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(index), device=index.device)
        first = first.scatter_reduce(0, inverse, torch.arange(len(index), device=index.device), "amin")
        weight, *terms = rows[first].sum(dim=0).unbind()
        return {name: (value / weight).float() for name, value in zip(self.names, terms, strict=True)}


class Completes(Protocol):
    """What is evaluated: a policy that completes prompts and is rewarded for it (see `LanguageModule`)."""

    eval_samples: int
    seed: int
    trainer: Any

    def generate(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, generator: PromptDraws | None = None, greedy: bool = False
    ) -> Rollouts:
        """Complete prompts."""
        ...

    def score(self, rollouts: Rollouts) -> Rewards:
        """Rewards of completions."""
        ...

    def answers(self, rollouts: Rollouts) -> list[str | None]:
        """Answers of completions."""
        ...

    def log_dict(self, dictionary: dict[str, Any], *, sync_dist: bool) -> None:
        """Lightning's."""
        ...


def evaluate(policy: Completes, prompts: Sequence[Prompt], metrics: EvaluationMetrics) -> None:
    """Complete prompts greedily and by sampling, and add what comes of it to the metrics."""
    greedy, sampled = policy.generate(prompts, 1, greedy=True), _sample(policy, prompts)
    metrics.update((greedy, policy.score(greedy)), (sampled, policy.score(sampled)), policy.answers(sampled))


def log_evaluation(policy: Completes, prefix: str, metrics: EvaluationMetrics) -> dict[str, dict[str, float]]:
    """Log PREFIX/METRIC over all sets, and PREFIX/SET/METRIC for each that has a name; then forget all prompts.

    Returns:
        Set -> metric -> value; "" for all sets.
    """
    found = {name: {key: float(value) for key, value in of_set.items()} for name, of_set in metrics.compute().items()}
    values = {
        "/".join(filter(None, (prefix, name, key))): value for name, of_set in found.items() for key, value in of_set.items()
    }
    policy.log_dict(values, sync_dist=policy.trainer.world_size > 1)
    metrics.reset()
    return found


def predictions(policy: Completes, prompts: Sequence[Prompt], encoder: PromptEncoder) -> list[dict[str, Any]]:
    """Sampled completions of prompts with their rewards, as records for JSON."""
    rollouts = _sample(policy, prompts)
    return prediction_records(
        rollouts, policy.score(rollouts), [encoder.render(prompt) for prompt in prompts], policy.answers(rollouts)
    )


def _sample(policy: Completes, prompts: Sequence[Prompt]) -> Rollouts:
    # The same draws at every evaluation, and none from the generators that training uses.
    return policy.generate(prompts, policy.eval_samples, PromptDraws(prompts, policy.eval_samples, policy.seed + 104_729))


def prediction_records(rollouts: Rollouts, rewards: Rewards, texts: list[str], answers: Answers) -> list[dict[str, Any]]:
    """One record per prompt, ready for JSON: what it is, and a list of each thing that is known of its completions."""
    samples = rollouts.samples_per_prompt
    records = []
    for number, (prompt, text) in enumerate(zip(rollouts.prompts, texts, strict=True)):
        rows = slice(number * samples, (number + 1) * samples)
        records.append(
            {
                "set": prompt.set_name,
                "index": prompt.index,
                "prompt": text,
                "answer": prompt.answer,
                "completions": list(rollouts.completions[rows]),
                "extracted_answers": list(answers[rows]),
                "lengths": rollouts.sequences.completion_mask[rows].sum(dim=1).tolist(),
                "finished": rollouts.finished[rows].tolist(),
                "rewards": rewards.total[rows].tolist(),
                "reward_parts": {name: part[rows].tolist() for name, part in rewards.parts.items()},
                "correct": rewards.correct[rows].tolist(),
            }
        )
    return records


def repeat_prompts(prompts: tuple[Prompt, ...], samples: int) -> list[Prompt]:
    """The prompt of each of B = P * G completions."""
    return [prompt for prompt in prompts for _ in range(samples)]
