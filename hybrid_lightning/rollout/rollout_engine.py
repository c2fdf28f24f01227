"""`RolloutEngine`: plays the episodes of a rollout, and samples the messages that they ask for.

Token ids go in and token ids come out, so nothing is tokenized twice. Each sampled token has its log-probability under
softmax(logits / temperature).

    RolloutEngine <- BatchEngine <- Sampler                 in this process, in batches, by the policy's own weights
                  <- WeightedEngine <- VLLMSampler          by a copy of the weights, which training makes stale: before a
                                    <- VLLMServerSampler    rollout, the engine receives the changed weights (`update`)

Axes: P prompts, G samples per prompt, B = P * G sequences, T completion tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.batching import pad_left, pad_token
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import (
    Begun,
    MessageRequest,
    Playable,
    PolicyWeights,
    PromptLogprobs,
    Sampled,
    SamplingRequest,
    ServedModel,
    Stops,
    WeightsVersion,
)
from hybrid_lightning.rollout.playing import NOTHING, Alone, Rounds, Surroundings
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Completion, Rollout, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner  # with PEFT, which is slow to import


class RolloutEngine(Configurable, ABC):
    """Makes completions; a subclass defines how.

    Args:
        max_new_tokens: Longest completion in tokens. A completion that reaches it without a stop token counts as not finished.
        temperature: Divides the logits; must be positive. Greedy decoding is a field of `SamplingRequest` instead: training with
            it would not explore.
        top_p: Sample from the smallest set of most probable tokens with probabilities that add up to this; 1 keeps all tokens.
        top_k: Sample from this many most probable tokens; 0 keeps all tokens.
        stop: Strings that end a completion. The tokens of such a string stay in the sequence; the text is cut before it.
        min_p: Sample from the tokens that are at least this share as probable as the most probable one (arXiv 2407.01082); 0
            keeps all tokens.

    Raises:
        ConfigError: If a value is impossible.
    """

    shares_device = False  # whether it allocates memory in this process, in its own way, on the training device
    is_remote = False  # whether episodes are played while this process continues, by engines that all ranks share

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
        stop = stop or ()  # null in a config
        if any(not text for text in stop):
            raise ConfigError("sampler.stop holds an empty string, which would end every completion at once; remove that string")
        self.max_new_tokens, self.temperature, self.stop = max_new_tokens, temperature, tuple(stop)
        self.top_p, self.top_k, self.min_p = top_p, top_k, min_p

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None, more: Sequence[str] = ()) -> Stops:
        """Make the conditions that end a completion: stop strings and these tokens; None: the tokenizer's end-of-sequence token.

        The stop strings are the engine's own and `more`.

        This is slow with stop strings, so callers that sample often make them once.

        Raises:
            ConfigError: If stop strings cannot be found in the text that this tokenizer decodes.
        """
        texts = [*self.stop, *more]
        try:
            strings = StopStringCriteria(tokenizer, texts) if texts else None
        except Exception as error:  # of the tokenizers library, which has no class of its own
            raise ConfigError(
                f"sampler.stop={texts} does not work with this model's tokenizer ({error}); set it to [], and let a "
                "stop token end completions"
            ) from error
        return Stops(tuple(ids or [int(tokenizer.eos_token_id)]), strings)

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether every token can be sampled: no top-k, top-p or min-p."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    @property
    def held_logits(self) -> int:
        """How many times the size of all rows' logits is in memory while a token is chosen, at most."""
        if self.keeps_all_tokens:
            return 1
        truncates = self.top_p < 1  # which sorts, and sums up
        return (8 if truncates else 4) + (self.temperature != 1) + (truncates and self.top_k > 0)

    def context(self, config: Any) -> tuple[float, str]:
        """Most tokens of a prompt with its completion by the model's config, infinite if unknown, and the limit's source."""
        return model_context(config)

    def check_prompt(self, config: Any, prompt_tokens: int, new_tokens: int | None = None) -> None:
        """Raise ConfigError if a prompt with its longest completion, None for `max_new_tokens`, exceeds the `context`."""
        check_length(prompt_tokens, new_tokens or self.max_new_tokens, *self.context(config))

    def checked_limits(self, runner: "ModelRunner", request: SamplingRequest) -> Sequence[int]:
        """Most new tokens of each completion, [B]; ConfigError if there is no room for them."""
        config, samples = getattr(runner.model, "config", None), request.samples_per_prompt
        limits = [self.max_new_tokens] * (samples * len(request.prompt_ids)) if request.limits is None else request.limits
        for number, ids in enumerate(request.prompt_ids):
            self.check_prompt(config, len(ids), max(limits[number * samples : (number + 1) * samples]))
        return limits

    def listener(
        self, tokenizer: PreTrainedTokenizerBase, request: SamplingRequest
    ) -> Callable[[int, Sequence[int], bool], None] | None:
        """What to call with the number, the tokens and `finished` of each completion that has ended; None if nothing listens."""
        on_completion, on_tokens = request.on_completion, request.on_tokens
        if on_completion is None and on_tokens is None:
            return None

        def ended(row: int, tokens: Sequence[int], finished: bool) -> None:
            if on_tokens is not None:
                on_tokens(row, tokens)
            if on_completion is not None:
                context = [request.prompt_ids[row // request.samples_per_prompt]]
                on_completion(row, self.completions(tokenizer, context, [tokens], [finished], request.stop)[0])

        return ended

    def release_memory(self) -> None:
        """Free memory that is not needed until the next call, if the engine shares a device with training."""

    def shut_down(self) -> None:
        """End everything that this engine has started. Servers that others started keep running."""

    @abstractmethod
    def play(
        self,
        runner: "ModelRunner",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        episodes: Sequence[Playable],
        capacity: int | None = None,
        around: Surroundings = NOTHING,
    ) -> Begun[None]:
        """Play the episodes of a rollout, and sample the messages that they ask for.

        An engine in this process has played them when this returns; a remote engine has begun.

        Args:
            runner: Runs a causal language model, which the caller puts into eval mode.
            tokenizer: Decodes the messages.
            request: The prompts and how to sample; without their tokens, which episodes bring.
            episodes: Some of the B episodes, by number.
            capacity: Most tokens of an episode after its prompt, sampled or added; None if an episode is a single message.
            around: What surrounds the episodes.

        Raises:
            ConfigError: If a prompt with its longest episode exceeds the model's positions.
            RolloutError: If the engine fails, or samples with weights other than the last `update` gave it.
        """

    def rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        tokens: Tensor,
        mask: Tensor,
        logprobs: Tensor,
        finished: Tensor,
        weights_step: Tensor | None = None,
    ) -> Rollout:
        """The rollout of a request, from the tokens that were sampled for it.

        Args:
            tokenizer: Decodes the tokens.
            request: The request, of P prompts.
            tokens: [B, T] int64, right-padded, including the token that ended each sequence, if one did.
            mask: [B, T] bool, True on tokens.
            logprobs: [B, T] float32.
            finished: [B] bool.
            weights_step: See `Sequences`.
        """
        samples = request.samples_per_prompt
        padded = pad_left(request.prompt_ids, pad_token(tokenizer), tokens.device)
        prompt_ids, prompt_mask = (part.repeat_interleave(samples, dim=0) for part in padded)
        rows = [row[:length] for row, length in zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)]
        completions = self.completions(tokenizer, request.prompt_ids, rows, finished.tolist(), request.stop)
        sequences = Sequences(prompt_ids, prompt_mask, tokens, mask, weights_step)
        return Rollout(tuple(request.prompts), completions, sequences, logprobs)

    def completions(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        finished: Sequence[bool],
        more: Sequence[str] = (),
    ) -> tuple[Completion, ...]:
        """Decode B = P * G completions, the G of a prompt side by side, including the token or string that ended them, if any.

        A text ends before the first of the engine's stop strings and `more`.
        """
        decoded = tokenizer.batch_decode([list(row) for row in tokens], skip_special_tokens=True)
        stops = (*self.stop, *more)
        texts = [text[: min((text.index(stop) for stop in stops if stop in text), default=None)] for text in decoded]
        samples = len(tokens) // max(1, len(prompt_ids))
        # Prompts that end in <think>, as chat templates of some reasoning models do.
        begun = [str(tokenizer.decode(list(ids[-16:]))).rstrip().endswith("<think>") for ids in prompt_ids]
        thinking = [within for within in begun for _ in range(samples)]
        lengths = [len(row) for row in tokens]
        rows = zip(texts, lengths, finished, thinking, strict=True)
        return tuple(Completion(*row) for row in rows)


class BatchEngine(RolloutEngine):
    """An engine in this process. It samples batches: whenever all live episodes of a rollout wait for the policy."""

    @abstractmethod
    def sample(self, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> Rollout:
        """Complete every prompt of a request; returns B = P * G sequences, on the model's device. See `play`."""

    def session(
        self, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest, capacity: int | None
    ) -> "Session":
        """Begin a rollout's episodes (see `play`)."""
        return Session(self, runner, tokenizer, request, capacity)

    def play(
        self,
        runner: "ModelRunner",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        episodes: Sequence[Playable],
        capacity: int | None = None,
        around: Surroundings = NOTHING,
    ) -> Begun[None]:
        """See `RolloutEngine`."""
        sessions: dict[tuple[str, ...], Session] = {(): self.session(runner, tokenizer, request, capacity)}
        messages: list[Sampled] = []
        with Alone(episodes) if around is NOTHING else Rounds(episodes, around) as rounds:
            while asked := rounds.advance(messages):
                found: dict[int, Sampled] = {}  # by place in `asked`
                for stop in dict.fromkeys(each.stop for each in asked):
                    if stop not in sessions:
                        stops = self.stops(tokenizer, None if request.stops is None else request.stops.ids, stop)
                        sessions[stop] = self.session(runner, tokenizer, replace(request, stop=stop, stops=stops), capacity)
                    places = [place for place, each in enumerate(asked) if each.stop == stop]
                    found |= zip(places, sessions[stop].sample([asked[place] for place in places]), strict=True)
                messages = [found[place] for place in range(len(asked))]
        return RolloutFuture.of(None)


class WeightedEngine(RolloutEngine):
    """An engine with a copy of the policy's weights."""

    version: WeightsVersion | None = None  # of the weights that `update` has given it; None: none yet
    sends_adapter = False  # whether it receives LoRA separately from the base, instead of merged weights

    def check_model(self, model: ServedModel) -> None:
        """Make sure, before time is spent on a run, that this engine can sample for a model.

        Raises:
            ConfigError: If it cannot.
        """

    def check_adapter(self, trains_fully: bool, use_dora: bool, ranks: Collection[int], experts: bool) -> None:
        """Raise ConfigError if it cannot receive an adapter with LoRA of these ranks, with or without LoRA on `experts`."""

    def needs_everything(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether the next `update` has to give it all weights, and not only the weights that training changes."""
        return False

    def update(
        self, weights: PolicyWeights, model: ServedModel, everything: bool | None = None, keeps_requests: bool = False
    ) -> None:
        """Give the engine the policy's weights, unless it has them already.

        If weights are split over ranks, all ranks call this, and iterate over what `stream` yields.

        Args:
            weights: The policy's current weights.
            model: The policy's model.
            everything: Whether all weights are given, as agreed by all ranks; None takes the answer of `needs_everything`.
            keeps_requests: Whether open requests continue with the new weights; if not, no request may be open.

        Raises:
            RolloutError: If the engine cannot receive them.
        """

    def take_idle_seconds(self) -> float:
        """Seconds since the last call in which a remote engine had no request, as far as their end is known."""
        return 0.0

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> "Future[list[PromptLogprobs]]":
        """Begin to compute log-probabilities of sequences of at least two tokens, on each copy of the weights that answers."""
        raise NotImplementedError

    @property
    def has_lost_weights(self) -> bool:
        """Whether open requests wait for weights that only `update` can give, because their engine was restarted."""
        return False

    def accept_weights(self, version: WeightsVersion) -> None:
        """Accept tokens sampled with these weights from open requests. All ranks call it before one of them updates."""


class Session:
    """Messages of the episodes of a rollout, in batches; each batch is sampled with everything before a message as its prompt.

    Sampled text is never tokenized again. An episode's random numbers depend on its prompt, its index among the samples, and the
    number of its request (see `PromptDraws.of_turns`). Weights do not change during a session.

    Args:
        engine: Makes the messages.
        runner: As in `BatchEngine.sample`, like tokenizer and request.
        tokenizer: See above.
        request: The prompts of all B episodes, without their tokens.
        capacity: Most tokens of an episode after its prompt, sampled or added; None if an episode is a single message.
    """

    def __init__(
        self,
        engine: BatchEngine,
        runner: "ModelRunner",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        capacity: int | None,
    ) -> None:
        self._engine, self._runner, self._tokenizer, self._capacity = engine, runner, tokenizer, capacity
        self._request = replace(request, stops=request.stops or engine.stops(tokenizer))

    def sample(self, asked: Sequence[MessageRequest]) -> list[Sampled]:
        """The messages that some episodes ask for, in the order of `asked`, which is by episode.

        Raises:
            ConfigError: If a prompt with an episode of this capacity exceeds the positions of the model or of the engine.
        """
        request, rows = self._request_for(asked)
        return messages_of(self._engine.sample(self._runner, self._tokenizer, request), rows)

    def _request_for(self, asked: Sequence[MessageRequest]) -> tuple[SamplingRequest, list[int]]:
        """The request of a batch that answers these, and the row of each answer in it.

        First messages after the prompts of their groups share the pass over their prompt.
        """
        samples, config = self._request.samples_per_prompt, getattr(self._runner.model, "config", None)
        ids = dict[int, Sequence[int]]()  # by prompt
        for each in asked:
            if not each.number and self._capacity is not None:
                self._engine.check_prompt(config, len(each.ids), each.capacity or self._capacity)
        begins = all(not each.number and ids.setdefault(each.episode // samples, each.ids) == each.ids for each in asked)
        if begins and 2 * len(asked) >= len(ids) * samples:
            return self._request_first(asked, ids)
        return self._request_alone(asked), list(range(len(asked)))

    def _request_first(
        self, asked: Sequence[MessageRequest], ids: Mapping[int, Sequence[int]]
    ) -> tuple[SamplingRequest, list[int]]:
        """The first messages, G of each prompt; an episode that asks for none gets one token, which nobody sees."""
        begun, samples, places = self._request, self._request.samples_per_prompt, sorted(ids)
        rows = [places.index(each.episode // samples) * samples + each.episode % samples for each in asked]
        limits = [1] * (len(places) * samples)
        for row, each in zip(rows, asked, strict=True):
            limits[row] = each.limit
        draws = begun.draws
        if isinstance(draws, PromptDraws):
            draws = draws.of_prompts(places)
        prompts = [begun.prompts[place] for place in places]
        return replace(begun, prompts=prompts, prompt_ids=[ids[place] for place in places], limits=limits, draws=draws), rows

    def _request_alone(self, asked: Sequence[MessageRequest]) -> SamplingRequest:
        """Messages after tokens of their own."""
        begun, draws = self._request, self._request.draws
        if isinstance(draws, PromptDraws):
            draws = draws.of_turns([each.episode for each in asked], [each.number for each in asked])
        return replace(
            begun,
            prompts=[begun.prompts[each.episode // begun.samples_per_prompt] for each in asked],
            prompt_ids=[each.ids for each in asked],
            samples_per_prompt=1,
            draws=draws,
            limits=[each.limit for each in asked],
            on_completion=None,
            on_tokens=None,
        )


def messages_of(rollout: Rollout, rows: Sequence[int]) -> list[Sampled]:
    """The messages in these rows of a batch."""
    sequences = rollout.sequences
    lengths, ids = sequences.completion_mask.sum(dim=1).tolist(), sequences.completion_ids.tolist()
    logprobs = rollout.sampling_logprobs.tolist()
    steps = [[] for _ in ids] if sequences.weights_step is None else sequences.weights_step.tolist()
    ends = [slice(length) for length in lengths]
    return [Sampled(ids[n][ends[n]], logprobs[n][ends[n]], steps[n][ends[n]], rollout.completions[n]) for n in rows]


def model_context(config: Any) -> tuple[float, str]:
    """See `RolloutEngine.context`; uses only the positions of a model with this config."""
    positions = getattr(config, "max_position_embeddings", math.inf)
    return positions, f"the model's {positions} positions"


def check_length(prompt_tokens: int, completion_tokens: int, limit: float, name: str) -> None:
    """Raise ConfigError if a prompt with its longest completion exceeds a limit, such as `RolloutEngine.context` gives."""
    if prompt_tokens + completion_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and a completion of {completion_tokens} exceed {name}; lower "
            "data.max_prompt_tokens, model.sampler.max_new_tokens or, for episodes, model.episodes.max_tokens"
        )
