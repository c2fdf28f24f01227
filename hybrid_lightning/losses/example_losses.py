"""Losses of completions that the data has: supervised fine-tuning, and direct preference optimisation.

Axes: E examples of R completions each (`rows_per_example`), which are neighbouring rows of [E * R, T].

A subclass gives a value for each example, its weight, and what the weights of the whole optimizer step add up to:

    loss = sum over examples of values / weight of the step

What a call returns is the share of its examples in that, as everywhere (see `base`): how a step is split never changes it.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import LossInputs, LossOutput


class ExampleLoss(Configurable, ABC):
    """Base class of losses of given completions."""

    rows_per_example = 1  # R
    # Shares of examples of which the policy is ahead of the start policy, which says nothing while it still is the start policy.
    shares_ahead: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logprobs` must be given."""
        return False

    @abstractmethod
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """What each example adds: name -> [E], `loss` among them with gradient, others to be logged."""

    @abstractmethod
    def weights(self, completion_mask: Tensor) -> Tensor:
        """What each example counts, [E]: its tokens, or 1."""

    @abstractmethod
    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """What the weights of all examples of the optimizer step add up to, over micro-batches and ranks."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """These examples' share in the optimizer step's loss, and in its metrics.

        Args:
            inputs: Log-probabilities, mask and denominators; advantages are not looked at.

        Raises:
            ConfigError: If the rows are no whole examples, or the reference is missing.
        """
        name = type(self).__name__
        if len(inputs.completion_mask) % self.rows_per_example:
            raise ConfigError(f"{name} needs {self.rows_per_example} rows an example, got {len(inputs.completion_mask)} rows")
        if self.needs_reference and inputs.ref_logprobs is None:
            raise ConfigError(f"{name} compares with the start policy: give LossInputs.ref_logprobs")
        total = self.step_weight(inputs)
        shares = {term: values.sum() / total for term, values in self.terms(inputs).items()}
        loss = shares.pop("loss")
        return LossOutput(loss, {term: value.detach() for term, value in shares.items()})


class SupervisedLoss(ExampleLoss):
    """Negative log-likelihood of the completions, a mean over all their tokens in the optimizer step:

        loss = -sum over examples and tokens of log pi(token) / tokens

    Prompts are not learned. The denominator is that of the step, over micro-batches and ranks, so that an example in a batch of
    long ones weighs what it weighs in a batch of short ones (as in TRL, whose `num_items_in_batch` it is).

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
        >>> SupervisedLoss()(LossInputs(logprobs, torch.ones(2), mask)).loss
        tensor(2.)
    """

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Loss, and entropy if there is one, summed over the tokens of each example."""
        terms = {"loss": -_sum(inputs.logprobs, inputs)}
        return terms if inputs.entropy is None else {**terms, "entropy": _sum(inputs.entropy, inputs)}

    def weights(self, completion_mask: Tensor) -> Tensor:
        """Its tokens."""
        return completion_mask.sum(dim=1)

    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """Tokens of the step."""
        return max(inputs.num_tokens, 1.0) if inputs.num_tokens is not None else inputs.completion_mask.sum().clamp(min=1)


class DPOLoss(ExampleLoss):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7), a mean over pairs:

        margin = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
        loss = -(1 - label_smoothing) log sigmoid(beta margin) - label_smoothing log sigmoid(-beta margin)

    Log-probabilities are sums over the tokens of a completion; `ref` is the start policy. Rows come in pairs: the chosen one and
    the rejected one. Label smoothing is the conservative DPO of its authors' code: the share of pairs that are taken to be
    labelled the wrong way round. (TRL 1.16 has this term in its loss `aot` and, debiased and with the opposite sign, in `robust`;
    its `sigmoid` knows no label smoothing.)

    Args:
        beta: Strength of the tie to the start policy.
        label_smoothing: In [0, 0.5).

    Raises:
        ConfigError: If a value is impossible.

    Example:
        >>> mask = torch.ones(2, 1, dtype=torch.bool)
        >>> DPOLoss()(LossInputs(torch.zeros(2, 1), torch.ones(2), mask, ref_logprobs=torch.zeros(2, 1))).loss
        tensor(0.6931)
    """

    rows_per_example = 2
    shares_ahead = ("rewards/accuracies",)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError(f"DPOLoss: beta={beta} must be positive, such as 0.1")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"DPOLoss: label_smoothing={label_smoothing} must be at least 0 and below 0.5")
        self.beta, self.label_smoothing = beta, label_smoothing

    @property
    def needs_reference(self) -> bool:
        """Always."""
        return True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Loss of each pair, and the implicit rewards beta log(pi / ref) under the names that users of TRL know."""
        assert inputs.ref_logprobs is not None, "checked before"
        logps = _sum(inputs.logprobs, inputs)
        rewards = self.beta * (logps - _sum(inputs.ref_logprobs, inputs))
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        loss = -F.logsigmoid(margins)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-margins)
        return {
            "loss": loss,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (margins > 0).to(margins.dtype),
            "rewards/margins": margins,
            "logps/chosen": logps[0::2],
            "logps/rejected": logps[1::2],
        }

    def weights(self, completion_mask: Tensor) -> Tensor:
        """Each pair counts the same."""
        return torch.ones(len(completion_mask) // 2, device=completion_mask.device)

    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """Pairs of the step."""
        return (len(inputs.completion_mask) if inputs.num_sequences is None else inputs.num_sequences) / 2


def _sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sum over the tokens of each row, [B]; padding may hold anything, and half precision is added up in float32."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return torch.where(inputs.completion_mask, values, 0).sum(dim=1)
