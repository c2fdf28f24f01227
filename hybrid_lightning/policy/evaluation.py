"""Evaluation of the policy on prompts: greedy and sampled completions, their rewards, and the metrics."""

from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lightning.metrics import CompletionMetrics
from hybrid_lightning.types import Prompt, Rewards, Rollouts


class EvaluationMetrics(nn.Module):
    """The two metrics of one evaluation: greedy completions, and n sampled ones.

    Args:
        samples: n.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.greedy = CompletionMetrics(1)
        self.sampled = CompletionMetrics(samples)

    def update(self, greedy: tuple[Rollouts, Rewards], sampled: tuple[Rollouts, Rewards]) -> None:
        """Add the prompts of one batch."""
        for metric, (rollouts, rewards) in ((self.greedy, greedy), (self.sampled, sampled)):
            shape = (len(rollouts.prompts), rollouts.samples_per_prompt)
            lengths = rollouts.sequences.completion_mask.sum(dim=1)
            index = torch.tensor([prompt.index for prompt in rollouts.prompts], device=lengths.device)
            metric.update(index, rewards.correct.view(shape), rewards.total.view(shape), lengths.view(shape))

    def compute(self) -> dict[str, Tensor]:
        """`greedy_accuracy`, `greedy_reward`, `avg@n`, `pass@k`, `reward`, `completion_length`."""
        greedy, sampled = self.greedy.compute(), self.sampled.compute()
        if not greedy:
            return {}
        length = sampled.pop("length")
        return {
            "greedy_accuracy": greedy["avg@1"],
            "greedy_reward": greedy["reward"],
            **sampled,
            "completion_length": length,
        }

    def reset(self) -> None:
        """Forget all prompts."""
        self.greedy.reset()
        self.sampled.reset()


def prediction_records(rollouts: Rollouts, rewards: Rewards, texts: list[str]) -> list[dict[str, Any]]:
    """One record per prompt, ready for JSON: prompt, answer, completions, rewards (total and parts), correct."""
    samples = rollouts.samples_per_prompt
    records = []
    for number, (prompt, text) in enumerate(zip(rollouts.prompts, texts, strict=True)):
        rows = slice(number * samples, (number + 1) * samples)
        records.append(
            {
                "index": prompt.index,
                "prompt": text,
                "answer": prompt.answer,
                "completions": list(rollouts.completions[rows]),
                "rewards": rewards.total[rows].tolist(),
                "reward_parts": {name: part[rows].tolist() for name, part in rewards.parts.items()},
                "correct": rewards.correct[rows].tolist(),
            }
        )
    return records


def repeat_prompts(prompts: tuple[Prompt, ...], samples: int) -> list[Prompt]:
    """The prompt of each of B = P * G completions."""
    return [prompt for prompt in prompts for _ in range(samples)]
