"""`RolloutEngine`: the interface by which the policy, its evaluation and its calibration get completions of prompts.

Prompts go in as token ids and completions come out as token ids, so that nothing is tokenized twice. With each token comes its
log-probability under softmax(logits / temperature).

Our `Sampler` computes with the policy's own weights. Another engine has a copy of them (`has_own_weights`), which training makes
stale: before it samples it is given what has changed (`update`), as `PolicyWeights`, whose `WeightsVersion` every completion then
names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.conversation import Conversation
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Completion, Prompt, Rollouts

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import


_T = TypeVar("_T")


@dataclass(frozen=True)
class Begun(Generic[_T]):
    """Something that was begun, and may be made elsewhere while this process goes on."""

    finish: Callable[[], _T]  # waits for it
    wait: Callable[[], None] = lambda: None  # for the part that is made elsewhere; `finish` has little to do after it
    cancel: Callable[[], None] = lambda: None  # ends it, where nobody needs it any more


@dataclass(frozen=True)
class Stops:
    """What ends a completion."""

    ids: tuple[int, ...]  # stop tokens
    strings: StopStringCriteria | None  # recognises stop strings; slow to make, since it looks at the whole vocabulary


@dataclass(frozen=True)
class WeightsVersion:
    """Which weights a policy has; equal versions are equal weights."""

    step: int  # optimizer steps that made them
    digest: str  # of the base model and the trained values

    def __str__(self) -> str:
        return f"{self.step}-{self.digest}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """The version that `str` wrote, None if it did not write this label."""
        step, _, digest = label.partition("-")
        return cls(int(step), digest) if step.isdecimal() and digest else None


class PolicyWeight(Protocol):
    """One weight as the policy computes with it: LoRA is merged into it."""

    @property
    def name(self) -> str:
        """Name in a checkpoint of the base model."""

    @property
    def shape(self) -> torch.Size:
        """Shape in such a checkpoint."""

    def write_rows(self, destination: Tensor, first: int) -> None:
        """Compute the rows from number `first` on in float32, and round them once to the dtype of the destination.

        It is [rows, ...], on the weight's device or another.
        """


class PolicyWeights(Protocol):
    """The weights of a policy at one moment, for engines that have weights of their own."""

    @property
    def version(self) -> WeightsVersion:
        """Which weights these are."""

    @property
    def base(self) -> str:
        """What tells the weights that training leaves alone from those of other models."""

    @property
    def is_sender(self) -> bool:
        """Whether this rank sends to engines that all ranks share. The others only take part in gathering what is split."""

    def shapes(self, everything: bool) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight that `stream` yields, in its order; nothing is gathered."""

    def stream(self, everything: bool) -> Iterator[PolicyWeight]:
        """All weights, or those that training changes, one at a time. If they are split over ranks, all ranks iterate together.

        What an engine may join into one layer (q/k/v, gate/up) always comes as a whole.
        """


@dataclass(frozen=True)
class ServedModel:
    """What an engine with weights of its own has to know of the policy's model."""

    config: Any  # of transformers
    tokenizer: PreTrainedTokenizerBase
    folder: str | None  # a folder with the weights that the policy started from; None: they have to be sent, all of them
    dtype: torch.dtype  # of the policy's matrix products
    device: torch.device  # that trains
    resumed: bool = False  # whether the policy's training goes on from a checkpoint


class RolloutEngine(Configurable, ABC):
    """Makes completions; a subclass says how.

    Args:
        max_new_tokens: Longest completion in tokens. One that reaches it without a stop token counts as not finished.
        temperature: Divides the logits; must be positive. Greedy decoding is an argument of `sample` instead, since training
            with it would have no exploration.
        top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this; 1 keeps all tokens.
        top_k: Sample from this many most probable tokens; 0 keeps all tokens.
        stop: Strings that end a completion. The tokens of such a string stay in the sequence; the text is cut before it.
        min_p: Sample from the tokens that are at least this share as probable as the most probable one (arXiv 2407.01082); 0
            keeps all tokens.

    Raises:
        ConfigError: If a value is impossible.
    """

    shares_device = False  # whether it allocates memory in this process, in a way of its own, on the device that trains
    has_own_weights = False  # whether `update` has to give it the policy's weights; the others sample with the policy itself
    completes_elsewhere = False  # whether completions are made in other processes, while this one goes on (see `begin`)
    requests_go_on = False  # whether those under way go on with new weights that `update` gives; else there must be none
    idle_seconds = 0.0  # for which it had nothing to do before the last requests, where it completes elsewhere
    shared_by_ranks = False  # whether all ranks sample with the same engines, which rank 0 then updates
    version: WeightsVersion | None = None  # of the weights that `update` has given it; None: none yet, or it has none of its own
    _conversation: type[Conversation] = Conversation
    renormalizes = False  # whether its log-probabilities are those among the tokens that top-k, top-p and min-p keep

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        min_p: float = 0.0,
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"sampler.max_new_tokens must be at least 1, got {max_new_tokens}")
        if not temperature > 0:
            raise ConfigError(f"sampler.temperature must be positive, got {temperature}; 1.0 samples from the policy itself")
        if not 0 < top_p <= 1:
            raise ConfigError(f"sampler.top_p must be in (0, 1], got {top_p}; 1 keeps all tokens")
        if top_k < 0:
            raise ConfigError(f"sampler.top_k must not be negative, got {top_k}; 0 keeps all tokens")
        if not 0 <= min_p <= 1:
            raise ConfigError(f"sampler.min_p must be in [0, 1], got {min_p}; 0 keeps all tokens")
        if isinstance(stop, str):
            raise ConfigError(f"sampler.stop must be a list of strings, got the string {stop!r}; write [{stop!r}]")
        if any(not text for text in stop):
            raise ConfigError("sampler.stop holds an empty string, which would end every completion at once; remove it")
        self.max_new_tokens, self.temperature, self.stop = max_new_tokens, temperature, tuple(stop)
        self.top_p, self.top_k, self.min_p = top_p, top_k, min_p

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None) -> Stops:
        """Make what ends a completion: stop strings and these tokens, or None the tokenizer's end-of-sequence token.

        That is slow where there are stop strings, so callers that sample often make it once.

        Raises:
            ConfigError: If stop strings cannot be found in what this tokenizer decodes.
        """
        try:
            strings = StopStringCriteria(tokenizer, list(self.stop)) if self.stop else None
        except Exception as error:  # of the tokenizers library, which has no class of its own
            raise ConfigError(
                f"sampler.stop={list(self.stop)} does not work with this model's tokenizer ({error}); remove it, and let a stop "
                "token end completions"
            ) from error
        return Stops(tuple(ids or [int(tokenizer.eos_token_id)]), strings)

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether every token can be sampled: no top-k, top-p or min-p."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    def check_model(self, model: ServedModel) -> None:
        """Make sure, before time is spent on a run, that this engine can sample for a model.

        Raises:
            ConfigError: If it cannot.
        """

    def check_prompt(self, config: Any, prompt_tokens: int, new_tokens: int | None = None) -> None:
        """Raise ConfigError if a prompt with its longest completion, None for `max_new_tokens`, is too long for the model."""
        check_positions(config, prompt_tokens, new_tokens or self.max_new_tokens)

    def _checked_limits(
        self, config: Any, prompt_ids: Sequence[Sequence[int]], limits: Sequence[int] | None, samples: int, greedy: bool
    ) -> Sequence[int]:
        """Most new tokens of the completions of each prompt, when it is sure that there is room for them."""
        assert not greedy or samples == 1, "greedy completions of one prompt are all the same"
        limits = [self.max_new_tokens] * len(prompt_ids) if limits is None else limits
        for ids, limit in zip(prompt_ids, limits, strict=True):
            self.check_prompt(config, len(ids), limit)
        return limits

    def needs_everything(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether the next `update` has to give it all weights, and not only those that training changes."""
        return False

    def update(self, weights: PolicyWeights, model: ServedModel, everything: bool | None = None) -> None:
        """Give an engine with weights of its own those of the policy, unless it has them already.

        Where weights are split over ranks, all ranks call this, and iterate over what `stream` yields.

        Args:
            weights: The policy's weights now.
            model: The policy's model.
            everything: Whether all weights are given, as all ranks have agreed; None: what `needs_everything` says.

        Raises:
            RolloutError: If they cannot be given to it.
        """

    def go_on_with(self, version: WeightsVersion) -> None:
        """Take tokens by these weights from requests that are under way. All ranks call it before one of them updates."""

    def updating(self) -> AbstractContextManager[Any]:
        """Within this context, in which it is given weights, completions that other threads ask for are not begun."""
        return nullcontext()

    def release_memory(self) -> None:
        """Free what is not needed until the next call, if the engine shares a device with training."""

    def shut_down(self) -> None:
        """End what this engine has started, but no server that others started."""

    @abstractmethod
    def sample(
        self,
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        generator: torch.Generator | PromptDraws | None = None,
        greedy: bool = False,
        stops: Stops | None = None,
        on_token: Callable[[int, int], None] | None = None,
        limits: Sequence[int] | None = None,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> Rollouts:
        """Complete every prompt `samples_per_prompt` times.

        Args:
            engine: Engine of a causal language model, which the caller puts into eval mode.
            tokenizer: Decodes the completions.
            prompts: P prompts, which become part of the result.
            prompt_ids: Token ids of the prompts.
            samples_per_prompt: Completions of each prompt (G).
            generator: Source of random numbers: a generator on the model's device, or `PromptDraws` of these prompts; None takes
                torch's global generator.
            greedy: Take the most probable token instead of sampling (`samples_per_prompt` must then be 1).
            stops: Result of the method `stops`; None makes it for this call.
            on_token: Called after every token with (sequences still running, tokens decoded), for progress bars. An exception
                from it ends the sampling.
            limits: Most new tokens of the completions of each prompt, [P]; None for `max_new_tokens`.
            on_completion: Called with the number of a completion, of B, and the completion as soon as it has ended, perhaps in
                another thread; not for all of them, as where they end together.

        Returns:
            Rollouts of B = P * G sequences, on the model's device.

        Raises:
            ConfigError: If a prompt with its longest completion exceeds the model's positions.
            RolloutError: If the engine fails, or completes with other weights than those of the last `update`.
        """

    def begin(self, *arguments: Any, **options: Any) -> Begun[Rollouts]:
        """Begin what `sample` with these arguments does. If completions are made elsewhere, they are from now on; else later."""
        return Begun(partial(self.sample, *arguments, **options))

    def conversation(self, *arguments: Any, **options: Any) -> Conversation:
        """Begin episodes of several turns: a `Conversation` with this engine and the arguments that it names after it."""
        return self._conversation(self, *arguments, **options)

    def completions(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        finished: Sequence[bool],
    ) -> tuple[Completion, ...]:
        """Decode B = P * G completions, the G of a prompt side by side, with the token or string that ended them, if one did."""
        decoded = tokenizer.batch_decode([list(row) for row in tokens], skip_special_tokens=True)
        # Before the first stop string in it.
        texts = [text[: min((text.index(stop) for stop in self.stop if stop in text), default=None)] for text in decoded]
        samples = len(tokens) // max(1, len(prompt_ids))
        # Prompts that end in <think>, as chat templates of some reasoning models write it.
        begun = [str(tokenizer.decode(list(ids[-16:]))).rstrip().endswith("<think>") for ids in prompt_ids]
        thinking = [within for within in begun for _ in range(samples)]
        lengths = [len(row) for row in tokens]
        rows = zip(texts, lengths, finished, thinking, strict=True)
        return tuple(Completion(*row) for row in rows)


def check_positions(config: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError if a prompt with its longest completion exceeds the positions of the model with this config."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions; lower "
            "data.max_prompt_tokens or sampler.max_new_tokens"
        )
