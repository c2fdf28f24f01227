"""Requests to a rollout engine, and its view of the policy's weights and model.

Every engine receives a `SamplingRequest`. An engine with a copy of the policy's weights receives new ones as `PolicyWeights`;
every completion then names their `WeightsVersion`.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Completion, Prompt

Begun = RolloutFuture  # work that an engine has begun, perhaps elsewhere
PEFT_PREFIX = "base_model.model."  # before the base model's names, in names of an adapter's weights
Draws = torch.Generator | PromptDraws | None  # generator on the model's device, or draws by prompt; None: torch's global one


@dataclass(frozen=True)
class Stops:
    """Conditions that end a completion."""

    ids: tuple[int, ...]  # stop tokens
    strings: StopStringCriteria | None  # recognises stop strings; slow to make, since it looks at the whole vocabulary


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts to complete and how: P prompts, G completions of each, B = P * G in prompt-major order."""

    prompts: Sequence[Prompt]  # P, which become part of the result
    prompt_ids: Sequence[Sequence[int]] = ()  # token ids of each prompt
    samples_per_prompt: int = 1  # G
    draws: Draws = None  # source of random numbers
    greedy: bool = False  # take the most probable token instead of sampling; G must then be 1
    stops: Stops | None = None  # from `RolloutEngine.stops`; None makes it for this request
    stop: tuple[str, ...] = ()  # strings that end these completions, besides the engine's own
    limits: Sequence[int] | None = None  # most new tokens of each completion, [B]; None: `max_new_tokens`
    # Called after every token with (sequences still running, tokens decoded), for progress bars. An exception from it ends the
    # sampling.
    on_token: Callable[[int, int], None] | None = None
    # Called with the number of a completion, of B, and the completion as soon as it has ended, while others are still decoded.
    on_completion: Callable[[int, Completion], object] | None = None
    # Receives the number and the tokens of each such completion.
    on_tokens: Callable[[int, Sequence[int]], object] | None = None

    def __post_init__(self) -> None:
        assert not self.greedy or self.samples_per_prompt == 1, "greedy completions of one prompt are all the same"


class MessageRequest(NamedTuple):  # one of thousands in a rollout: a frozen dataclass takes three times as long to make
    """What an episode asks the policy for: its next message."""

    episode: int  # number of the episode in its rollout, of B = P * G in prompt-major order
    # Which message of the episode, for its random numbers: the number of the message, from 0, in the episode's only or first
    # row; in further rows a name.
    number: int | str
    ids: Sequence[int]  # all tokens before the message: the prompt, earlier messages, and what was added to them
    limit: int  # most tokens of the message
    row: int = 0  # which row of the episode the message continues
    stop: tuple[str, ...] = ()  # strings that end the message, besides the engine's own
    capacity: int | None = None  # most tokens of the row after its prompt; None: as for all episodes (see `RolloutEngine.play`)


class Sampled(NamedTuple):
    """A message that the policy sampled."""

    ids: list[int]  # its tokens, including the token that ended it, if one did
    logprobs: list[float]  # of each token, in nats
    steps: list[int]  # optimizer steps of the weights that sampled each token; empty: the weights when the rollout began
    completion: Completion  # the decoded message


AskPolicy = Callable[[MessageRequest], Awaitable[Sampled]]


class Playable(Protocol):
    """An episode: a coroutine that asks the policy for messages."""

    number: int  # in its rollout, of B

    async def play(self, ask: AskPolicy) -> None:
        """Play the episode to its end, from its current state."""

    def relocated(self) -> "Playable":
        """The episode as it is to be continued on another event loop, since this one was blocked by code that runs on it."""


@dataclass(frozen=True)
class WeightsVersion:
    """Which weights a policy has; equal versions are equal weights."""

    step: int  # optimizer steps that made them
    digest: str  # of the base model and the trained values

    def __str__(self) -> str:
        return f"{self.step}-{self.digest}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """The version that `str` wrote; None if `str` did not write this label."""
        step, _, digest = label.partition("-")
        return cls(int(step), digest) if step.isdecimal() and digest else None


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities that one engine gives to the tokens of sequences, at temperature 1 and among all tokens."""

    engine: str  # which engine, such as the address of a server
    version: WeightsVersion | None  # of the weights it computed with; None: several versions, or another sender
    logprobs: Sequence[Sequence[float]]  # of each sequence's tokens except the first
    in_float32: bool = True  # computed in float32, neither in 16 bits nor with a quantized model or cache


@dataclass(frozen=True)
class PolicyWeight:
    """One weight as the policy computes with it, with LoRA merged."""

    name: str  # in a checkpoint of the base model
    shape: torch.Size  # in such a checkpoint
    # Fills a destination [rows, ...], on any device, with rows starting at a given number: computed in float32, and rounded once
    # to its dtype.
    write_rows: Callable[[Tensor, int], None]


class PolicyWeights(Protocol):
    """The weights of a policy at one moment, for engines with weights of their own."""

    version: WeightsVersion  # which weights these are
    base: str  # distinguishes the weights that training leaves alone from other models' weights
    is_sender: bool  # whether this rank sends to engines that all ranks share; the others only help to gather split weights

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """PEFT's config of the LoRA factors that `stream` yields, after the base and by PEFT's names; None if it yields none."""

    def shapes(self, everything: bool) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight that `stream` yields, in its order; nothing is gathered."""

    def stream(self, everything: bool) -> Iterator[PolicyWeight]:
        """All weights, or the weights that training changes, one at a time.

        If they are split over ranks, all ranks iterate together. Weights that an engine may join into one layer (q/k/v, gate/up)
        always come as a whole. If LoRA is not merged, `everything` means the base and the LoRA factors, and the weights that
        training changes are only the factors.
        """


@dataclass(frozen=True)
class ServedModel:
    """The facts about the policy's model that an engine with its own weights needs."""

    config: Any  # config of transformers
    tokenizer: PreTrainedTokenizerBase
    folder: str | None  # a folder with the weights that the policy started from; None: all weights have to be sent
    dtype: torch.dtype  # of the policy's matrix products
    device: torch.device  # device that trains
    resumed: bool = False  # whether the policy's training continues from a checkpoint
    lora_rank: int = 0  # largest LoRA rank; 0 without LoRA
    lora_modules: tuple[str, ...] = ()  # last parts of the names of modules that have LoRA
