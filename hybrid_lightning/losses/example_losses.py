"""Losses on completions from the data: supervised fine-tuning, and direct preference optimisation (DPO).

Axes: E examples of R completions each (`rows_per_example`), which are neighbouring rows of [E * R, T].

A subclass defines the value and the weight of each example, and the sum of the weights over the whole optimizer step:

    loss = (sum of the values of all examples) / (sum of the weights over the step)

A call returns the share of its examples in that loss, as the policy losses do (see `policy_loss`): how a step is split never
changes the loss.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import LossInputs, LossOutput


class ExampleLoss(Configurable, ABC):
    """Base class of losses on given completions."""

    rows_per_example = 1  # R
    # Metrics that count the examples on which the policy is ahead of the start policy: before the first step they mean nothing.
    shares_ahead: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logprobs` must be given."""
        return False

    @abstractmethod
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The values of each example: name -> [E]. `loss` must be among them, with gradient; the others are logged."""

    @abstractmethod
    def weights(self, sampled_mask: Tensor) -> Tensor:
        """The weight of each example, [E]: its number of tokens, or 1."""

    @abstractmethod
    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """The sum of the weights of all examples in the optimizer step, over micro-batches and ranks."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the share of these examples in the optimizer step's loss, and in its metrics.

        Args:
            inputs: Log-probabilities, mask and denominators; advantages are ignored.

        Raises:
            ConfigError: If the reference is missing.
        """
        if self.needs_reference and inputs.ref_logprobs is None:
            raise ConfigError(f"{type(self).__name__} compares with the start policy; give LossInputs.ref_logprobs")
        total = self.step_weight(inputs)
        shares = {term: values.sum() / total for term, values in self.terms(inputs).items()}
        loss = shares.pop("loss")
        return LossOutput(loss, {term: value.detach() for term, value in shares.items()})


class SupervisedLoss(ExampleLoss):
    """Negative log-likelihood of the completions; mean over all their tokens in the optimizer step.

        loss = -(sum over examples and tokens of log pi(token)) / (tokens of the step)

    Prompt tokens are not learned. The denominator counts the whole step, over micro-batches and ranks, so that an example weighs
    the same in a micro-batch of long examples and in one of short examples (in TRL it is `num_items_in_batch`).

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
        >>> SupervisedLoss()(LossInputs(logprobs, torch.ones(2), mask)).loss
        tensor(2.)
    """

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The loss, and the entropy if it is given, summed over the tokens of each example."""
        terms = {"loss": -_sum(inputs.logprobs, inputs)}
        return terms if inputs.entropy is None else {**terms, "entropy": _sum(inputs.entropy, inputs)}

    def weights(self, sampled_mask: Tensor) -> Tensor:
        """The number of tokens of each example."""
        return sampled_mask.sum(dim=1)

    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """The number of trained tokens in the step."""
        return max(inputs.num_tokens, 1.0) if inputs.num_tokens is not None else inputs.sampled_mask.sum().clamp(min=1)


class DPOLoss(ExampleLoss):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7); mean over pairs.

        margin = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))
        loss = -(1 - label_smoothing) log sigmoid(beta margin) - label_smoothing log sigmoid(-beta margin)

    Log-probabilities are sums over the tokens of a completion; `ref` is the start policy. Rows come in pairs: the chosen
    completion, then the rejected one. `label_smoothing`, the assumed share of pairs with swapped labels, is conservative DPO as
    in the authors' code. (TRL 1.16 has this term in its loss `aot` and, debiased and with the opposite sign, in `robust`; its
    loss `sigmoid` has no label smoothing.)

    Args:
        beta: How strongly the policy is held to the start policy.
        label_smoothing: Share of pairs assumed to be labelled wrongly, in [0, 0.5).

    Raises:
        ConfigError: If a value is out of its range.

    Example:
        >>> mask = torch.ones(2, 1, dtype=torch.bool)
        >>> DPOLoss()(LossInputs(torch.zeros(2, 1), torch.ones(2), mask, ref_logprobs=torch.zeros(2, 1))).loss
        tensor(0.6931)
    """

    rows_per_example = 2
    shares_ahead = ("rewards/accuracies",)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError(f"DPOLoss: beta={beta} must be positive; set e.g. 0.1")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"DPOLoss: label_smoothing={label_smoothing} must be at least 0 and below 0.5; set 0 for none")
        self.beta, self.label_smoothing = beta, label_smoothing

    @property
    def needs_reference(self) -> bool:
        """Always True."""
        return True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The loss of each pair, and the implicit rewards beta log(pi / ref) under their names in TRL."""
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

    def weights(self, sampled_mask: Tensor) -> Tensor:
        """Every pair has weight 1."""
        return torch.ones(len(sampled_mask) // 2, device=sampled_mask.device)

    def step_weight(self, inputs: LossInputs) -> Tensor | float:
        """The number of pairs in the step."""
        return (len(inputs.sampled_mask) if inputs.num_sequences is None else inputs.num_sequences) / 2


def _sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sum over the tokens of each row, [B]. Padding may hold anything; half precision is added up in float32."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return torch.where(inputs.sampled_mask, values, 0).sum(dim=1)
