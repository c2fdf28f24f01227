"""Calibration by examples: the gradient of supervised fine-tuning or of a preference loss at the start policy."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lightning.losses import ExampleLoss
from hybrid_lightning.types import LossInputs, Sequences


class ExampleCalibration:
    """Losses of runs of examples, whose mean is the training loss of all of them; iterating computes them afresh.

    The first iteration is at the start policy and keeps its log-probabilities as the reference.

    Args:
        sequences: N rows.
        runs: Slices of them that take one forward and backward pass each, as in training.
        loss: The training loss.
        logprobs: Log-probabilities with gradient and entropies of B sequences, [B, T] each.
    """

    def __init__(
        self,
        sequences: Sequences,
        runs: Sequence[slice],
        loss: ExampleLoss,
        logprobs: Callable[[Sequences], tuple[Tensor, Tensor]],
    ) -> None:
        self.chunks = [sequences.rows(run) for run in runs]
        self.loss, self.logprobs = loss, logprobs
        # Denominators of which the mean over runs is the mean over all rows or tokens.
        self.num_sequences = len(sequences) / len(runs)
        self.num_tokens = float(sequences.completion_mask.sum()) / len(runs)
        self.references: list[Tensor] = []  # of each run
        self.info: dict[str, Any] = {
            "signal": "examples",
            "sequences": len(sequences),
            "useful_sequences": len(sequences),
        }

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Tensor]:
        return self.since(0)

    def state_dict(self) -> dict[str, Any]:
        """Log-probabilities of the start policy so far."""
        return {"references": self.references}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from a run that was stopped."""
        device = self.chunks[0].completion_ids.device
        self.references = [logprobs.to(device) for logprobs in state["references"]]

    def since(self, seen: int) -> Iterator[Tensor]:
        """The losses after so many."""
        for number, sequences in enumerate(self.chunks[seen:], start=seen):
            logprobs, _ = self.logprobs(sequences)
            if number == len(self.references):
                self.references.append(logprobs.detach())
            inputs = LossInputs(
                logprobs=logprobs,
                advantages=torch.ones(len(sequences), device=logprobs.device),
                completion_mask=sequences.completion_mask,
                ref_logprobs=self.references[number],
                num_sequences=self.num_sequences,
                num_tokens=self.num_tokens,
            )
            yield self.loss(inputs).loss
