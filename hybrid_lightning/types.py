"""The data that one stage of training passes to the next, as frozen dataclasses.

    Prompt -> Rollout (Completion, Sequences, Rewards, advantages) -> PolicyBatch -> LossInputs -> LossOutput

Axes: P prompts, G episodes per prompt in prompt-major order (the G completions of a prompt are adjacent), K turns; R or B rows of
tokens, one or more for each episode in the order of the episodes; S prompt tokens (left-padded), T completion tokens
(right-padded).

A completion holds everything after the prompt: the tokens that the policy sampled and, in an episode of several turns, the tokens
that an environment added. `completion_mask` marks real tokens, as opposed to padding, for forward passes and their cost;
`sampled_mask` marks sampled tokens, for losses, means, lengths and denominators.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

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
class Rewards(_TensorContainer):
    """The rewards of completions. In a rollout, each tensor is [P, G]; by turn (see `rewards_to_go`) it is [P, G, K]."""

    total: Tensor  # float32, the training signal, in the reward's own unit
    parts: dict[str, Tensor]  # name -> float32 before weighting; a single reward has one part
    correct: Tensor  # bool: True if all parts that measure correctness are fully earned
    weights: dict[str, float] = field(default_factory=dict)  # name -> weight of the part in `total`; 1 for missing names
    # bool: False for a completion that is left out because its environment or judge failed. It enters no mean, deviation or
    # count, and its rewards are meaningless. None if all completions count; either all ranks have None or no rank has.
    counted: Tensor | None = None
    measures_correctness: bool = True  # whether some part does; if not, `correct` is no accuracy: it is total >= 1

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Rewards":
        """The rewards with a function applied to each tensor."""
        parts = {name: function(part) for name, part in self.parts.items()}
        counted = None if self.counted is None else function(self.counted)
        return replace(self, total=function(self.total), correct=function(self.correct), parts=parts, counted=counted)

    def select(self, index: Tensor | slice) -> "Rewards":
        """The rewards of the groups at `index`, or of the completions where a mask [P, G] is True, [N]."""
        return self.apply(lambda values: values[index])

    def counts(self, prompt: int, sample: int) -> bool:
        """Whether a completion counts."""
        return self.counted is None or bool(self.counted[prompt, sample])

    def right(self, prompt: int, sample: int) -> bool | None:
        """Whether a completion is right; None if it does not count, or if no part measures correctness."""
        measured = self.measures_correctness and self.counts(prompt, sample)
        return bool(self.correct[prompt, sample]) if measured else None

    def of_counted(self) -> "Rewards":
        """The rewards of the completions that count, [N]."""
        return self.apply(torch.flatten) if self.counted is None else self.select(self.counted)


@dataclass(frozen=True)
class Rollout(_TensorContainer):
    """Completions of P prompts, G of each, with what is found out about them on the way: rewards, advantages, metrics.

    A callback gets it as `batch.rollout` with each training micro-batch. With several processes, each has its own share of the
    prompts. All values are from the time when the rollout was made, before it updated the policy.

    An *episode* is one of the P * G attempts at a prompt, and a completion is what a reward reads of it. Without an environment,
    an episode is one sampled text. Its tokens are a row of `sequences`, or several rows if its history was rewritten.

    Attributes:
        prompts: P prompts, with `text` or `messages`, `answer` and `columns`.
        completions: P * G texts without special tokens, with `num_tokens` (sampled tokens), `finished` (False if cut) and
            `episode`. The G completions of a prompt are adjacent.
        sequences: R rows of tokens: `prompt_ids` [R, S] and `completion_ids` [R, T], int64, with `prompt_mask`, `completion_mask`
            (True on tokens, False on padding) and `sampled_mask` (True on tokens that the policy sampled), bool.
        sampling_logprobs: [R, T] float32 in nats: log-probability of each token when it was sampled, 0 elsewhere.
        episode_of_row: [R] int64, ascending: the episode of each row, a number of `completions`. By default, one row each.
        rewards: `total`, `parts` and others, [P, G] each (see `Rewards`); None before scoring.
        advantages: [P, G] float32, or by turn [P, G, K], in the unit of the estimator (`GroupAdvantage`: standard deviations of
            the group); None before they are estimated.
        token_advantages: [R, T] float32: the advantage of each token, 0 where nothing was sampled, with credit by turn or from a
            teacher (its part included); None if all tokens of an episode have its advantage.
        useful: [P] bool: groups that give a learning signal, with dynamic sampling; None without.
        metrics: Over all ranks, logged with the first step of the rollout.

    Example:
        `rollout.rewards.total.mean(dim=1)` are the mean rewards of the prompts.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]
    sequences: Sequences
    sampling_logprobs: Tensor
    episode_of_row: Tensor = None  # type: ignore[assignment]  # set below
    rewards: Rewards | None = None
    advantages: Tensor | None = None
    token_advantages: Tensor | None = None
    useful: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.episode_of_row is None:
            rows = torch.arange(len(self.sequences), device=self.sequences.completion_ids.device)
            object.__setattr__(self, "episode_of_row", rows)

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.completions) // max(1, len(self.prompts))

    @property
    def scored(self) -> Rewards:
        """The rewards, known to be there."""
        assert self.rewards is not None, "it has not been scored"
        return self.rewards

    @property
    def finished(self) -> Tensor:
        """[P, G] bool (see `Completion.finished`)."""
        return self._of_completions([completion.finished for completion in self.completions])

    @property
    def cut(self) -> Tensor:
        """[P, G] bool: True if a token limit ended the completion (see `Completion.is_cut`)."""
        return self._of_completions([completion.is_cut for completion in self.completions])

    @property
    def lengths(self) -> Tensor:
        """[P, G] int64: sampled tokens of each episode."""
        return self.sum_rows(self.sequences.sampled_mask.sum(dim=1))

    @property
    def mean_advantages(self) -> Tensor:
        """[P, G]: the advantage of each episode, the mean over its sampled tokens if these have their own."""
        assert self.advantages is not None, "they have been estimated"
        if self.token_advantages is None:
            return self.advantages
        sums = self.sum_rows(self.token_advantages.where(self.sequences.sampled_mask, 0.0).sum(dim=1))
        return sums / self.lengths.clamp(min=1)

    def sum_rows(self, values: Tensor) -> Tensor:
        """The sum over the rows of each episode, [P, G], from one value per row, [R]."""
        sums = values.new_zeros(len(self.completions)).index_add_(0, self.episode_of_row, values)
        return sums.view(len(self.prompts), -1)

    def first_row(self, episode: int) -> int:
        """The first row of an episode, or the number of rows after the last one."""
        return int(torch.searchsorted(self.episode_of_row, episode))

    def of_rows(self, values: Tensor) -> Tensor:
        """The value of each row's episode, [R], from [P, G]."""
        return values.flatten()[self.episode_of_row]

    def _of_completions(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, dtype=torch.bool, device=self.episode_of_row.device).view(len(self.prompts), -1)


def counted_groups(values: Tensor, counted: Tensor | None) -> list[Tensor]:
    """The groups of completions of the same prompt, without completions that are left out.

    Args:
        values: [P, G], values of completions.
        counted: See `Rewards`, [P, G] bool or None.

    Returns:
        For each n from 1 on: the numbers, among all P * G, of the completions that count in the p groups that have exactly n of
        them, [p, n].

    Example:
        >>> counted = torch.tensor([[True, True], [False, True]])
        >>> [numbers.tolist() for numbers in counted_groups(torch.zeros(2, 2), counted)]
        [[[3]], [[0, 1]]]
    """
    if counted is None:
        return [torch.arange(values.numel(), device=values.device).view(values.shape)] if values.numel() else []
    sizes = counted.sum(dim=1)
    return [
        (counted & (sizes == size)[:, None]).flatten().nonzero().view(-1, size) for size in sizes.unique().tolist() if size > 0
    ]


def equal_groups(values: Tensor, counted: Tensor | None) -> Tensor:
    """Whether all completions that count in a group earn the same, [P] bool; True if only one counts, or none.

    Args:
        values: Rewards or other values of completions, [P, G]; by turn [P, G, K], which gives [P, K].
        counted: See `Rewards`, of the same shape or None.
    """
    low, high = values, values
    if counted is not None:
        low, high = values.masked_fill(~counted, math.inf), values.masked_fill(~counted, -math.inf)
    return high.amax(dim=1) <= low.amin(dim=1)


@dataclass(frozen=True)
class LossInputs(_TensorContainer):
    """The inputs of a policy loss."""

    logprobs: Tensor  # [B, T] float32 with gradient: log pi(token) of the policy being trained
    advantages: Tensor  # [B] float32; or [B, T], one for each token (see `PolicyLoss.takes_token_advantages`)
    sampled_mask: Tensor  # [B, T] bool, True on tokens to learn from; values at other tokens are undefined
    old_logprobs: Tensor | None = None  # [B, T] before the rollout's first step, or the sampler's; None: `logprobs.detach()`
    ref_logprobs: Tensor | None = None  # [B, T] of the start policy; needed if `kl_coef` is not 0
    sampling_logprobs: Tensor | None = None  # [B, T] as the sampler computed them; None: `old_logprobs`
    num_sequences: float | None = None  # episodes in the optimizer step, over micro-batches and ranks; None: only these
    num_tokens: float | None = None  # number of sampled tokens in the optimizer step, likewise
    updated_sequences: float | None = None  # how many of `num_sequences` are in the update; metrics are means over these
    updated_tokens: float | None = None  # how many of `num_tokens`, likewise
    importance_weights: Tensor | None = None  # [B, T] factors of the policy term (see `PolicyLoss`); None: all 1
    entropy: Tensor | None = None  # [B, T] in nats, with gradient; needed if `entropy_coef` is not 0
    divergence: Tensor | None = None  # [B, T] from a teacher, with gradient and weighted: added to the loss of each token
    max_completion_tokens: float | None = None  # most tokens that can be sampled in a row; `DrGRPOLoss` needs it
    micro_batch_tokens: float | None = None  # sampled tokens in the micro-batch that these rows belong to; None: only these
    num_micro_batches: float | None = None  # number of micro-batches in the optimizer step, over ranks; None: 1
    # [B] float32: the row's share of its episode's sampled tokens, by which it weighs in means over sequences; None: all 1.
    row_weights: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """A loss and metrics to log with it."""

    loss: Tensor  # scalar: the share of these sequences in the optimizer step's loss (shares are added up, not averaged)
    metrics: dict[str, Tensor]  # name -> scalar without gradient


@dataclass(frozen=True)
class PolicyBatch(_TensorContainer):
    """Rows to train on: this rank's whole rollout, then one micro-batch of it, then a chunk of that."""

    sequences: Sequences  # B rows, as the loss sees them: rows of episodes that are left out have no tokens
    advantages: Tensor  # [B] float32; or [B, T] with credit by turn or from a teacher, 0 for tokens that were not sampled
    sampling_logprobs: Tensor  # [B, T] float32, as the sampler computed them (see `Rollout`)
    old_logprobs: Tensor | None = None  # [B, T]; None if the micro-batch is exactly on-policy
    ref_logprobs: Tensor | None = None  # [B, T]; None if the loss has no KL term
    num_sequences: float = 0.0  # number of episodes in the optimizer step of this micro-batch, over all micro-batches and ranks
    num_tokens: float = 0.0  # number of sampled tokens in that optimizer step, likewise
    updated_sequences: float = 0.0  # how many of `num_sequences` are in a micro-batch: some without advantage may be left out
    updated_tokens: float = 0.0  # how many of `num_tokens`, likewise
    rollout: Rollout | None = None  # this process's part of its rollout; None for demonstrations and pairs
    rollout_number: int = 0  # number of the rollout in the run
    policy_mask: Tensor | None = None  # [B, T] bool: tokens that get a policy gradient (see `TopEntropyMask`); None: all
    seen_by_teacher: Sequences | None = None  # the same completions after other prompts; None: after these
    # [B] int64, ascending: equal numbers mark rows of the same episode. By default, each row is an episode.
    episode_of_row: Tensor = None  # type: ignore[assignment]  # set below
    # [B] float32: the share of each row in its episode's sampled tokens; 0 if the episode does not count. By default, all 1.
    row_weights: Tensor = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        device = self.advantages.device
        if self.episode_of_row is None:
            object.__setattr__(self, "episode_of_row", torch.arange(len(self.sequences), device=device))
        if self.row_weights is None:
            object.__setattr__(self, "row_weights", torch.ones(len(self.sequences), device=device))

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the rollout, to log."""
        return {} if self.rollout is None else self.rollout.metrics

    def to(self, device: torch.device | str, **kwargs: Any) -> "PolicyBatch":
        """A copy with its own tensors on `device`; the rollout, which several batches share, stays the same object."""
        own = super(PolicyBatch, replace(self, rollout=None)).to(device, **kwargs)
        return replace(own, rollout=self.rollout)

    def rows(self, index: Tensor | slice) -> "PolicyBatch":
        """The rows at `index`, without the columns that are padding in all of them."""
        sequences = self.sequences.rows(index)
        width = sequences.completion_ids.shape[1]

        def cut(value: Any) -> Any:
            if value is self.sequences:
                return sequences
            if isinstance(value, Sequences):
                return value.rows(index)
            if not isinstance(value, Tensor):
                return value
            return value[index] if value.dim() == 1 else value[index][:, :width]

        return type(self)(**{name: cut(value) for name, value in vars(self).items()})

    def split(self, parts: int) -> "list[PolicyBatch]":
        """Parts with whole episodes, in order, and as equal in the number of episodes as possible."""
        rows_of_episodes = self.episode_of_row.unique_consecutive(return_counts=True)[1].cpu()
        sizes = [int(part.sum()) for part in rows_of_episodes.tensor_split(parts)]
        return [self.rows(rows) for rows in torch.arange(len(self.sequences), device=self.advantages.device).split(sizes)]

    def loss_inputs(self, logprobs: Tensor, importance_weights: Tensor | None = None, **values: Any) -> LossInputs:
        """Combine the values of the update with the values computed at rollout time.

        Args:
            logprobs: Log-probabilities of the policy being trained, [B, T].
            importance_weights: Weights of tokens, [B, T]; tokens outside `policy_mask` get 0 instead.
            values: Other fields of `LossInputs`.
        """
        if self.policy_mask is not None:
            kept = self.policy_mask.to(logprobs.dtype)
            importance_weights = kept if importance_weights is None else importance_weights * kept
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
            importance_weights=importance_weights,
            row_weights=self.row_weights,
            **values,
        )
