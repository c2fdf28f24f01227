"""The nouns of both flows: what one stage hands to the next.

Axes: P prompts, G samples per prompt, B = P * G sequences in prompt-major order (the G completions of a prompt are
neighbours), S prompt tokens (left-padded), T completion tokens (right-padded).
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One problem: exactly one of `text` and `messages` is set."""

    text: str | None = None  # a plain prompt, given to the tokenizer as it is
    messages: tuple[dict[str, str], ...] | None = None  # chat turns {"role", "content"}, rendered by the chat template
    answer: str | None = None  # the reference answer, None where the data has none
    index: int = 0  # number of the row in its source, before any split or filter: identifies the problem
    source: str = ""  # where the row comes from, for error messages
    columns: dict[str, Any] = field(default_factory=dict)  # the whole row, for rewards that need more than the answer
    set_name: str = ""  # the named set that the problem belongs to, which evaluation reports on its own; "" if there is one set
    set_weight: float | None = None  # what training draws of its set, relative to other sets; None: in proportion to its size
    completions: tuple[str, ...] = ()  # to train on: a demonstration, or the chosen and the rejected one; none for rewards

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a Prompt has either text or messages"


class Completion(str):
    """The text of a completion, which also knows how many tokens it took, whether it came to an end and how it began.

    To whoever needs none of it it is a plain string.

    Example:
        >>> completion = Completion("12", num_tokens=3, finished=True)
        >>> completion == "12", completion.num_tokens
        (True, 3)
    """

    num_tokens: int  # as in `Sequences.completion_mask`: up to and including the stop token
    finished: bool  # True if ended by a stop token, False if cut at the maximum length
    thinking: bool  # True if the prompt ends in <think>, as chat templates of some reasoning models write it

    def __new__(cls, text: str, num_tokens: int, finished: bool, thinking: bool = False) -> Self:
        """A string with three attributes."""
        self = super().__new__(cls, text)
        self.num_tokens, self.finished, self.thinking = num_tokens, finished, thinking
        return self

    def __getnewargs__(self) -> tuple[str, int, bool, bool]:  # type: ignore[override]  # what copies and pickles are made from
        return str(self), self.num_tokens, self.finished, self.thinking


class _TensorContainer:
    """Moves every tensor of a dataclass, nested ones included (Lightning's batch transfer calls `to`)."""

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """A copy with every tensor on `device`."""
        moved = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            moved[entry.name] = value.to(device, **kwargs) if isinstance(value, (Tensor, _TensorContainer)) else value
            if isinstance(value, dict):
                moved[entry.name] = {k: v.to(device, **kwargs) if isinstance(v, Tensor) else v for k, v in value.items()}
        return type(self)(**moved)


@dataclass(frozen=True)
class Sequences(_TensorContainer):
    """Prompts and completions as tokens, ready for a forward pass."""

    prompt_ids: Tensor  # [B, S] int64, left-padded
    prompt_mask: Tensor  # [B, S] bool, True on real tokens
    completion_ids: Tensor  # [B, T] int64, right-padded
    completion_mask: Tensor  # [B, T] bool, True up to and including the stop token

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def rows(self, index: Tensor | slice) -> "Sequences":
        """The sequences at `index`, with the columns that are padding in all of them cut off."""
        prompt_mask, completion_mask = self.prompt_mask[index], self.completion_mask[index]
        start = int(prompt_mask.shape[1] - prompt_mask.sum(dim=1).max()) if len(prompt_mask) else 0
        end = int(completion_mask.sum(dim=1).max()) if len(completion_mask) else 0
        end = max(end, 1)  # a forward pass needs one completion position even if every completion is empty
        return Sequences(
            self.prompt_ids[index][:, start:],
            prompt_mask[:, start:],
            self.completion_ids[index][:, :end],
            completion_mask[:, :end],
        )


@dataclass(frozen=True)
class Rollouts:
    """Completions of P prompts, G each."""

    prompts: tuple[Prompt, ...]  # P
    sequences: Sequences  # B = P * G rows
    completions: tuple[Completion, ...]  # B decoded texts without special tokens
    sampling_logprobs: Tensor  # [B, T] float32: log-probability of each token when it was sampled (see `Sampler`)
    finished: Tensor  # [B] bool: True if ended by a stop token, False if cut at the maximum length
    samples_per_prompt: int  # G


@dataclass(frozen=True)
class Rewards(_TensorContainer):
    """What a reward function says of B completions."""

    total: Tensor  # [B] float32, the training signal
    parts: dict[str, Tensor]  # name -> [B] float32 before weighting; a single reward has one part
    correct: Tensor  # [B] bool: the parts that measure correctness are all fully earned
    weights: dict[str, float] = field(default_factory=dict)  # name -> of the part in `total`; 1 for names that are not there


@dataclass(frozen=True)
class LossInputs(_TensorContainer):
    """All that a policy loss may look at."""

    logprobs: Tensor  # [B, T] float32 with gradient: log pi(token) of the policy being trained
    advantages: Tensor  # [B] float32
    completion_mask: Tensor  # [B, T] bool
    old_logprobs: Tensor | None = None  # [B, T] of the policy that sampled; None: exactly on-policy, `logprobs.detach()`
    ref_logprobs: Tensor | None = None  # [B, T] of the start policy; needed when `kl_coef` is not 0
    num_sequences: float | None = None  # sequences in the optimizer step, over micro-batches and ranks; None: those here
    num_tokens: float | None = None  # completion tokens in the optimizer step, likewise
    updated_sequences: float | None = None  # of `num_sequences`, those that take part in the update: what metrics are means over
    updated_tokens: float | None = None  # of `num_tokens`, likewise
    importance_weights: Tensor | None = None  # [B, T] factors of the policy term (see `PolicyLoss`); None: all 1
    entropy: Tensor | None = None  # [B, T] in nats, with gradient; needed when `entropy_coef` is not 0
    max_completion_tokens: float | None = None  # longest completion that the sampler makes; `DrGRPOLoss` needs it
    micro_batch_tokens: float | None = None  # completion tokens in the micro-batch of these rows; None: those here
    num_micro_batches: float | None = None  # micro-batches in the optimizer step, over ranks; None: 1


@dataclass(frozen=True)
class LossOutput:
    """A loss and what to log beside it."""

    loss: Tensor  # scalar: the share of these sequences in the optimizer step's loss (shares add up, not average)
    metrics: dict[str, Tensor]  # name -> scalar without gradient


@dataclass(frozen=True)
class PolicyBatch(_TensorContainer):
    """One micro-batch of training data, made at rollout time."""

    sequences: Sequences  # B rows
    advantages: Tensor  # [B] float32
    sampling_logprobs: Tensor  # [B, T] float32, as the sampler saw them (see `Rollouts`)
    old_logprobs: Tensor | None  # [B, T]; None if the micro-batch is exactly on-policy
    ref_logprobs: Tensor | None  # [B, T]; None if the loss has no KL term
    num_sequences: float  # in the optimizer step that this micro-batch belongs to, over all its micro-batches and ranks
    num_tokens: float  # completion tokens in that optimizer step, likewise
    updated_sequences: float  # of `num_sequences`, those in a micro-batch: rows without advantage may be left out
    updated_tokens: float  # of `num_tokens`, likewise
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout that these rows come from, for logging
    policy_mask: Tensor | None = None  # [B, T] bool: tokens that get a policy gradient (see `TopEntropyMask`); None: all

    def with_logprobs(self, old_logprobs: Tensor | None, ref_logprobs: Tensor | None) -> "PolicyBatch":
        """The same batch with log-probabilities of the sampling and the start policy, [B, T] each."""
        return replace(self, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)

    def rows(self, index: Tensor | slice) -> "PolicyBatch":
        """The rows at `index`, with the columns that are padding in all of them cut off."""
        sequences = self.sequences.rows(index)
        width = sequences.completion_ids.shape[1]

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index][:, :width]

        return replace(
            self,
            sequences=sequences,
            advantages=self.advantages[index],
            sampling_logprobs=self.sampling_logprobs[index][:, :width],
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            policy_mask=cut(self.policy_mask),
        )

    def loss_inputs(self, logprobs: Tensor) -> LossInputs:
        """Join the log-probabilities of the policy being trained, [B, T], with what was known at rollout time."""
        return LossInputs(
            logprobs=logprobs,
            advantages=self.advantages,
            completion_mask=self.sequences.completion_mask,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            updated_sequences=self.updated_sequences,
            updated_tokens=self.updated_tokens,
            importance_weights=None if self.policy_mask is None else self.policy_mask.to(logprobs.dtype),
        )
