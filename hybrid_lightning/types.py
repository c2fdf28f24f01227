"""The data that one stage of training passes to the next, as frozen dataclasses.

    Prompt -> Rollouts (Completion, Sequences) -> Rewards -> PolicyBatch -> LossInputs -> LossOutput

Axes: P prompts, G samples per prompt, B = P * G sequences in prompt-major order (the G completions of a prompt are adjacent), S
prompt tokens (left-padded), T completion tokens (right-padded).

A completion holds everything after the prompt: the tokens that the policy sampled and, in an episode of several turns, the tokens
that an environment added. `completion_mask` marks real tokens, as opposed to padding, for forward passes and their cost;
`sampled_mask` marks sampled tokens, for losses, means, lengths and denominators.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

Message = Mapping[str, Any]  # of a conversation: {"role": ..., "content": text}, and other keys of a chat template


@dataclass(frozen=True)
class Prompt:
    """One problem: exactly one of `text` and `messages` is set."""

    text: str | None = None  # a plain prompt, tokenized unchanged
    messages: tuple[dict[str, str], ...] | None = None  # chat turns {"role", "content"}, rendered by the chat template
    answer: str | None = None  # the reference answer; None if the data has none
    index: int = 0  # number of the row in its source, before any split or filter: identifies the problem
    source: str = ""  # where the row comes from, for error messages
    columns: dict[str, Any] = field(default_factory=dict)  # the whole row, for rewards that need more than the answer
    set_name: str = ""  # name of the set of the problem, which evaluation reports separately; "" if there is one set
    set_weight: float | None = None  # share of its set in training, relative to other sets; None: in proportion to its size
    completions: tuple[str, ...] = ()  # given completions to train on: a demonstration, or a chosen and a rejected one

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a Prompt has either text or messages"

    @property
    def place(self) -> str:
        """Where the prompt comes from, for messages."""
        return f"{self.source or 'the data'} row {self.index}"


@dataclass(frozen=True)
class Episode:
    """A conversation between a policy and an environment, for rewards, logs and predictions."""

    messages: tuple[Message, ...]  # all messages: the prompt's, the policy's (role "assistant") and the added ones
    turns: int  # messages of the policy
    end: str  # why it ended: "answered", "over" (by the environment), "turns", "tokens", "time", "failed"
    rewards: tuple[float, ...]  # from the environment, one per turn
    counts: Mapping[str, float] = field(default_factory=dict)  # counts by the environment, such as {"calls": 2}
    lengths: tuple[int, ...] = ()  # sampled tokens of each turn; empty for a failed episode

    @property
    def answer(self) -> str:
        """The last message of the policy; empty if there is none."""
        return next((str(message["content"]) for message in reversed(self.messages) if message["role"] == "assistant"), "")


class Completion(str):
    """The text of a completion, with its number of tokens, whether it is finished, and whether it begins within reasoning.

    It is a string, and can be used as one. For an episode, the text consists of the policy's messages, joined by line breaks;
    `episode` has the conversation.

    Example:
        >>> completion = Completion("12", num_tokens=3, finished=True)
        >>> completion == "12", completion.num_tokens
        (True, 3)
    """

    num_tokens: int  # sampled tokens, as in `Sequences.sampled_mask`: up to and including the stop token
    finished: bool  # True if a stop token or stop string ended it; for an episode, if its answer or its environment did
    thinking: bool  # True if the prompt ends in <think>, as the chat templates of some reasoning models do
    episode: Episode | None  # None without an environment

    def __new__(cls, text: str, num_tokens: int, finished: bool, thinking: bool = False, episode: Episode | None = None) -> Self:
        """Make a string with four attributes."""
        self = super().__new__(cls, text)
        self.num_tokens, self.finished, self.thinking, self.episode = num_tokens, finished, thinking, episode
        return self

    @property
    def is_cut(self) -> bool:
        """Whether a token limit ended it. An episode may also be unfinished because of its turns, its time or a failure."""
        return not self.finished if self.episode is None else self.episode.end == "tokens"

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]  # copies and pickles are made from these
        return str(self), self.num_tokens, self.finished, self.thinking, self.episode


class _TensorContainer:
    """Moves all tensors of a dataclass together, including nested ones (Lightning's batch transfer calls `to`)."""

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """A copy with every tensor on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(item) for name, item in value.items()}
            return value.to(device, **kwargs) if isinstance(value, (Tensor, _TensorContainer)) else value

        entries = fields(self)  # type: ignore[arg-type]
        return type(self)(**{entry.name: moved(getattr(self, entry.name)) for entry in entries})


@dataclass(frozen=True)
class Sequences(_TensorContainer):
    """Prompts and completions as tokens, ready for a forward pass."""

    prompt_ids: Tensor  # [B, S] int64, left-padded
    prompt_mask: Tensor  # [B, S] bool, True on real tokens
    completion_ids: Tensor  # [B, T] int64, right-padded
    completion_mask: Tensor  # [B, T] bool, True on real tokens: up to and including the last one, without holes
    # [B, T] int64, optimizer steps of the weights that sampled each token; None if nothing was sampled.
    weights_step: Tensor | None = None
    # [B, T] bool, True on the tokens of `completion_mask` that the policy sampled (in a demonstration: tokens to learn), with
    # holes where an environment added tokens. By default, all tokens were sampled.
    sampled_mask: Tensor = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.sampled_mask is None:
            object.__setattr__(self, "sampled_mask", self.completion_mask)

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def rows(self, index: Tensor | slice) -> "Sequences":
        """The sequences at `index`, without the columns that are padding in all of them."""
        prompt_mask, completion_mask = self.prompt_mask[index], self.completion_mask[index]
        start = int(prompt_mask.shape[1] - prompt_mask.sum(dim=1).max()) if len(prompt_mask) else 0
        end = int(completion_mask.sum(dim=1).max()) if len(completion_mask) else 0
        end = max(end, 1)  # a forward pass needs one completion position even if every completion is empty
        return Sequences(
            self.prompt_ids[index][:, start:],
            prompt_mask[:, start:],
            self.completion_ids[index][:, :end],
            completion_mask[:, :end],
            None if self.weights_step is None else self.weights_step[index][:, :end],
            self.sampled_mask[index][:, :end],
        )

    def without(self, rows: Tensor) -> "Sequences":
        """A copy without tokens in `rows`, [B] bool, so that nothing is learned from them."""
        keep = ~rows[:, None]
        return replace(self, completion_mask=self.completion_mask & keep, sampled_mask=self.sampled_mask & keep)


@dataclass(frozen=True)
class Rollouts(_TensorContainer):
    """Completions of P prompts, G for each prompt."""

    prompts: tuple[Prompt, ...]  # P
    sequences: Sequences  # B = P * G rows
    completions: tuple[Completion, ...]  # B decoded texts without special tokens
    sampling_logprobs: Tensor  # [B, T] float32: log-probability of each token when it was sampled (see `Sampler`), 0 elsewhere
    finished: Tensor  # [B] bool (see `Completion.finished`)
    samples_per_prompt: int  # G

    @property
    def cut(self) -> Tensor:
        """[B] bool: True if a token limit ended the completion (see `Completion.is_cut`)."""
        return torch.tensor([completion.is_cut for completion in self.completions], device=self.finished.device)


@dataclass(frozen=True)
class Rewards(_TensorContainer):
    """The rewards of B completions."""

    total: Tensor  # [B] float32, the training signal
    parts: dict[str, Tensor]  # name -> [B] float32 before weighting; a single reward has one part
    correct: Tensor  # [B] bool: True if all parts that measure correctness are fully earned
    weights: dict[str, float] = field(default_factory=dict)  # name -> weight of the part in `total`; 1 for missing names
    # [B] bool: False for a completion that is left out because its environment or judge failed. It enters no mean, deviation or
    # count, and its rewards are meaningless. None if all completions count; either all ranks have None or no rank has.
    counted: Tensor | None = None
    measures_correctness: bool = True  # whether some part does; if not, `correct` is no accuracy: it is total >= 1

    def select(self, index: Tensor) -> "Rewards":
        """The rewards of the completions at `index`."""
        parts = {name: part[index] for name, part in self.parts.items()}
        counted = None if self.counted is None else self.counted[index]
        return replace(self, total=self.total[index], correct=self.correct[index], parts=parts, counted=counted)

    def counts(self, row: int) -> bool:
        """Whether a completion counts."""
        return self.counted is None or bool(self.counted[row])

    def right(self, row: int) -> bool | None:
        """Whether a completion is right; None if it does not count, or if no part measures correctness."""
        return bool(self.correct[row]) if self.measures_correctness and self.counts(row) else None

    def of_counted(self) -> "Rewards":
        """The rewards of the completions that count."""
        return self if self.counted is None else self.select(self.counted)


class ScoredRollout(NamedTuple):
    """A rollout with its rewards and advantages, for callbacks: `batch.rollout` of a training micro-batch.

    With several processes, each has its own share of the prompts. Rows 0 to G - 1 of all tensors, and the first G
    `rollouts.completions`, belong to `rollouts.prompts[0]`, the next G to the second prompt, and so on. All values are from the
    time when the rollout was made, before it updated the policy.

    - `rollouts`: P prompts with G = `rollouts.samples_per_prompt` completions each. `prompts` holds P objects with `text` or
      `messages`, `answer` and `columns`. `completions` holds B = P * G texts, with `num_tokens` (sampled tokens), `finished`
      (False if cut at `max_new_tokens`) and `episode`. `sequences` holds their tokens: `prompt_ids` [B, S] and `completion_ids`
      [B, T], int64, with `prompt_mask`, `completion_mask` (True on tokens, False on padding) and `sampled_mask` (True on tokens
      that the policy sampled), bool of the same shapes. `sampling_logprobs` [B, T] float32 is in nats, 0 for tokens that were not
      sampled. `finished` is [B] bool.
    - `rewards`: `total` [B] float32, the training signal, in the reward's own unit; `parts`, name -> [B] float32 before
      weighting; `correct` [B] bool, which means nothing if `measures_correctness` is False; `counted` [B] bool, False for
      completions that are left out, or None if all count.
    - `advantages`: [B] float32, in the unit of the advantage estimator (`GroupAdvantage`: standard deviations of the group). If
      each token has its own advantage, the mean over the sampled tokens of a completion.

    Example:
        `rollouts, rewards, advantages = batch.rollout`, or `batch.rollout.rewards.total.mean()`.
    """

    rollouts: Rollouts
    rewards: Rewards
    advantages: Tensor


def counted_groups(rewards: Tensor, samples_per_prompt: int, counted: Tensor | None) -> list[Tensor]:
    """The groups of completions of the same prompt, without completions that are left out.

    Args:
        rewards: [B], or other values of completions.
        samples_per_prompt: G.
        counted: See `Rewards`, [B] bool or None.

    Returns:
        For each n from 1 on: the rows of the completions that count in the p groups that have exactly n of them, [p, n].

    Example:
        >>> [rows.tolist() for rows in counted_groups(torch.zeros(4), 2, torch.tensor([True, True, False, True]))]
        [[[3]], [[0, 1]]]
    """
    if counted is None:
        return [torch.arange(len(rewards), device=rewards.device).view(-1, samples_per_prompt)] if len(rewards) else []
    groups = counted.view(-1, samples_per_prompt)
    sizes = groups.sum(dim=1)
    return [
        (groups & (sizes == size)[:, None]).flatten().nonzero().view(-1, size) for size in sizes.unique().tolist() if size > 0
    ]


def equal_groups(rewards: Tensor, samples_per_prompt: int, counted: Tensor | None) -> Tensor:
    """Whether all completions that count in a group earn the same reward, [p] bool; True if only one counts, or none.

    Args:
        rewards: [p * G], or other values of completions.
        samples_per_prompt: G.
        counted: See `Rewards`, [p * G] bool or None.
    """
    low, high = rewards, rewards
    if counted is not None:
        low, high = rewards.masked_fill(~counted, math.inf), rewards.masked_fill(~counted, -math.inf)
    return high.view(-1, samples_per_prompt).amax(dim=1) <= low.view(-1, samples_per_prompt).amin(dim=1)


@dataclass(frozen=True)
class LossInputs(_TensorContainer):
    """The inputs of a policy loss."""

    logprobs: Tensor  # [B, T] float32 with gradient: log pi(token) of the policy being trained
    advantages: Tensor  # [B] float32; or [B, T], one for each token (see `PolicyLoss.takes_token_advantages`)
    sampled_mask: Tensor  # [B, T] bool, True on tokens to learn from; values at other tokens are undefined
    old_logprobs: Tensor | None = None  # [B, T] under the policy that sampled; None: exactly on-policy, `logprobs.detach()`
    ref_logprobs: Tensor | None = None  # [B, T] of the start policy; needed if `kl_coef` is not 0
    sampling_logprobs: Tensor | None = None  # [B, T] as the sampler computed them; None: `old_logprobs`
    num_sequences: float | None = None  # sequences in the optimizer step, over micro-batches and ranks; None: only these
    num_tokens: float | None = None  # number of sampled tokens in the optimizer step, likewise
    updated_sequences: float | None = None  # how many of `num_sequences` are in the update; metrics are means over these
    updated_tokens: float | None = None  # how many of `num_tokens`, likewise
    importance_weights: Tensor | None = None  # [B, T] factors of the policy term (see `PolicyLoss`); None: all 1
    entropy: Tensor | None = None  # [B, T] in nats, with gradient; needed if `entropy_coef` is not 0
    divergence: Tensor | None = None  # [B, T] from a teacher, with gradient and weighted: added to the loss of each token
    max_completion_tokens: float | None = None  # most tokens that can be sampled in a row; `DrGRPOLoss` needs it
    micro_batch_tokens: float | None = None  # sampled tokens in the micro-batch that these rows belong to; None: only these
    num_micro_batches: float | None = None  # number of micro-batches in the optimizer step, over ranks; None: 1


@dataclass(frozen=True)
class LossOutput:
    """A loss and metrics to log with it."""

    loss: Tensor  # scalar: the share of these sequences in the optimizer step's loss (shares are added up, not averaged)
    metrics: dict[str, Tensor]  # name -> scalar without gradient


@dataclass(frozen=True)
class PolicyBatch(_TensorContainer):
    """One micro-batch of training data, made when the rollout is made."""

    sequences: Sequences  # B rows
    advantages: Tensor  # [B] float32; or [B, T] with credit by turn or from a teacher, 0 for tokens that were not sampled
    sampling_logprobs: Tensor  # [B, T] float32, as the sampler computed them (see `Rollouts`)
    old_logprobs: Tensor | None  # [B, T]; None if the micro-batch is exactly on-policy
    ref_logprobs: Tensor | None  # [B, T]; None if the loss has no KL term
    num_sequences: float  # number of sequences in the optimizer step of this micro-batch, over all its micro-batches and ranks
    num_tokens: float  # number of sampled tokens in that optimizer step, likewise
    updated_sequences: float  # how many of `num_sequences` are in a micro-batch: rows without advantage may be left out
    updated_tokens: float  # how many of `num_tokens`, likewise
    metrics: dict[str, float] = field(default_factory=dict)  # metrics of the rollout, to log
    rollout: ScoredRollout | None = None  # this process's part of its rollout; None for demonstrations and pairs
    rollout_number: int = 0  # number of the rollout in the run
    policy_mask: Tensor | None = None  # [B, T] bool: tokens that get a policy gradient (see `TopEntropyMask`); None: all
    seen_by_teacher: Sequences | None = None  # the same completions after other prompts; None: after these

    def rows(self, index: Tensor | slice) -> "PolicyBatch":
        """The rows at `index`, without the columns that are padding in all of them."""
        sequences = self.sequences.rows(index)
        width = sequences.completion_ids.shape[1]

        def cut(values: Tensor | None) -> Any:
            return values if values is None else values[index] if values.dim() == 1 else values[index][:, :width]

        return replace(
            self,
            sequences=sequences,
            advantages=cut(self.advantages),
            sampling_logprobs=cut(self.sampling_logprobs),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            policy_mask=cut(self.policy_mask),
            seen_by_teacher=None if self.seen_by_teacher is None else self.seen_by_teacher.rows(index),
        )

    def loss_inputs(self, logprobs: Tensor) -> LossInputs:
        """Combine the log-probabilities of the policy being trained, [B, T], with the values computed at rollout time."""
        return LossInputs(
            logprobs=logprobs,
            advantages=self.advantages,
            sampled_mask=self.sequences.sampled_mask,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampling_logprobs=self.sampling_logprobs,
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            updated_sequences=self.updated_sequences,
            updated_tokens=self.updated_tokens,
            importance_weights=None if self.policy_mask is None else self.policy_mask.to(logprobs.dtype),
        )
