"""Evaluation of the policy on prompts: greedy and sampled completions, their rewards, and the metrics."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lightning.metrics import ProblemMeans, completion_draws, completion_values
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
