"""`RolloutEngine`: the interface that the policy, its evaluation and its calibration use to get completions of prompts.

Prompts go in as token ids and completions come out as token ids, so nothing is tokenized twice. Each token has its
log-probability under softmax(logits / temperature).

Our `Sampler` computes with the policy's own weights. Other engines have a copy of them (`needs_weight_sync`), which training
makes stale: before such an engine samples, it receives the changed weights (`update`).

`Conversation` continues episodes, turn by turn, after the text that an environment has added to them:

    conversation = sampler.conversation(engine, tokenizer, request, capacity=512)
    turn = conversation.first()                         the first message of every episode, as from `sample`
    turn = conversation.next([0, 3], [[5, 6], [7]])     the next message of episodes 0 and 3, after these added tokens

Axes: P prompts, G samples per prompt, B = P * G sequences, R of them that continue, T completion tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.batching import pad_left, pad_token
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.interface import (
    PolicyWeights,
    PromptLogprobs,
    SamplingRequest,
    ServedModel,
    Stops,
    WeightsVersion,
)
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Completion, Rollouts, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import


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
    needs_weight_sync = False  # whether `update` has to send it the policy's weights; if not, it samples with the policy itself
    # Whether completions are made in other processes, while this one continues (see `begin`), by engines that all ranks share.
    is_remote = False
    inflight_updates = False  # whether open requests continue with new weights from `update`; else no request may be open
    version: WeightsVersion | None = None  # of the weights that `update` has given it; None: none yet, or no own weights
    scores_prompts = False  # whether it has `prompt_logprobs`, which compare its weights with the policy's
    sends_adapter = False  # whether it receives LoRA separately from the base, instead of merged weights
    renormalizes = False  # whether its log-probabilities are over the tokens that top-k, top-p and min-p keep

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

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None) -> Stops:
        """Make the conditions that end a completion: stop strings and these tokens; None: the tokenizer's end-of-sequence token.

        This is slow with stop strings, so callers that sample often make them once.

        Raises:
            ConfigError: If stop strings cannot be found in the text that this tokenizer decodes.
        """
        try:
            strings = StopStringCriteria(tokenizer, list(self.stop)) if self.stop else None
        except Exception as error:  # of the tokenizers library, which has no class of its own
            raise ConfigError(
                f"sampler.stop={list(self.stop)} does not work with this model's tokenizer ({error}); set it to [], and let a "
                "stop token end completions"
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

    def check_adapter(self, trains_fully: bool, use_dora: bool, ranks: Collection[int], experts: bool) -> None:
        """Raise ConfigError if it cannot receive an adapter with LoRA of these ranks, with or without LoRA on `experts`."""

    def context(self, config: Any) -> tuple[float, str]:
        """Most tokens of a prompt with its completion by the model's config, infinite if unknown, and the limit's source."""
        return model_context(config)

    def check_prompt(self, config: Any, prompt_tokens: int, new_tokens: int | None = None) -> None:
        """Raise ConfigError if a prompt with its longest completion, None for `max_new_tokens`, exceeds the `context`."""
        check_length(prompt_tokens, new_tokens or self.max_new_tokens, *self.context(config))

    def _checked_limits(self, engine: "Engine", request: SamplingRequest) -> Sequence[int]:
        """Most new tokens of each completion, [B]; ConfigError if there is no room for them."""
        config, samples = getattr(engine.model, "config", None), request.samples_per_prompt
        limits = [self.max_new_tokens] * (samples * len(request.prompt_ids)) if request.limits is None else request.limits
        for number, ids in enumerate(request.prompt_ids):
            self.check_prompt(config, len(ids), max(limits[number * samples : (number + 1) * samples]))
        return limits

    def _listener(
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
                on_completion(row, self.completions(tokenizer, context, [tokens], [finished])[0])

        return ended

    def needs_everything(self, weights: PolicyWeights, model: ServedModel) -> bool:
        """Whether the next `update` has to give it all weights, and not only the weights that training changes."""
        return False

    def update(self, weights: PolicyWeights, model: ServedModel, everything: bool | None = None) -> None:
        """Give an engine with its own weights the policy's, unless it has them already.

        If weights are split over ranks, all ranks call this, and iterate over what `stream` yields.

        Args:
            weights: The policy's current weights.
            model: The policy's model.
            everything: Whether all weights are given, as agreed by all ranks; None takes the answer of `needs_everything`.

        Raises:
            RolloutError: If the engine cannot receive them.
        """

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> "Future[list[PromptLogprobs]]":
        """Begin to compute log-probabilities of sequences of at least two tokens, on each copy of the weights that answers."""
        raise NotImplementedError

    @property
    def has_lost_weights(self) -> bool:
        """Whether open requests wait for weights that only `update` can give, because their engine was restarted."""
        return False

    def accept_weights(self, version: WeightsVersion) -> None:
        """Accept tokens sampled with these weights from open requests. All ranks call it before one of them updates."""

    def updating(self) -> AbstractContextManager[Any]:
        """Hold back completions that other threads request, while the engine receives weights within this context."""
        return nullcontext()

    def take_idle_seconds(self) -> float:
        """Seconds since the last call in which a remote engine had no request, as far as their end is known."""
        return 0.0

    def release_memory(self) -> None:
        """Free memory that is not needed until the next call, if the engine shares a device with training."""

    def shut_down(self) -> None:
        """End everything that this engine has started. Servers that others started keep running."""

    @abstractmethod
    def sample(self, engine: "Engine", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> Rollouts:
        """Complete every prompt of a request.

        Args:
            engine: Engine of a causal language model, which the caller puts into eval mode.
            tokenizer: Decodes the completions.
            request: What to complete, and how.

        Returns:
            Rollouts of B = P * G sequences, on the model's device.

        Raises:
            ConfigError: If a prompt with its longest completion exceeds the model's positions.
            RolloutError: If the engine fails, or completes with weights other than the last `update` gave it.
        """

    def begin(self, engine: "Engine", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> RolloutFuture[Rollouts]:
        """Begin to `sample`. A remote engine starts now; any other one completes when the result is requested."""
        return RolloutFuture(lambda: self.sample(engine, tokenizer, request))

    def conversation(
        self, engine: "Engine", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest, capacity: int
    ) -> "Conversation":
        """Begin episodes of several turns, of at most `capacity` tokens after the prompt (see `Conversation`)."""
        return Conversation(self, engine, tokenizer, request, capacity)

    def rollouts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        tokens: Tensor,
        mask: Tensor,
        logprobs: Tensor,
        finished: Tensor,
        weights_step: Tensor | None = None,
    ) -> Rollouts:
        """The rollouts of a request, from the tokens that were sampled for it.

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
        completions = self.completions(tokenizer, request.prompt_ids, rows, finished.tolist())
        sequences = Sequences(prompt_ids, prompt_mask, tokens, mask, weights_step)
        return Rollouts(tuple(request.prompts), sequences, completions, logprobs, finished, samples)

    def completions(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        finished: Sequence[bool],
    ) -> tuple[Completion, ...]:
        """Decode B = P * G completions, the G of a prompt side by side, including the token or string that ended them, if any."""
        decoded = tokenizer.batch_decode([list(row) for row in tokens], skip_special_tokens=True)
        # Up to the first stop string in it.
        texts = [text[: min((text.index(stop) for stop in self.stop if stop in text), default=None)] for text in decoded]
        samples = len(tokens) // max(1, len(prompt_ids))
        # Prompts that end in <think>, as chat templates of some reasoning models do.
        begun = [str(tokenizer.decode(list(ids[-16:]))).rstrip().endswith("<think>") for ids in prompt_ids]
        thinking = [within for within in begun for _ in range(samples)]
        lengths = [len(row) for row in tokens]
        rows = zip(texts, lengths, finished, thinking, strict=True)
        return tuple(Completion(*row) for row in rows)


class Conversation:
    """Episodes with any rollout engine: it receives the context of a message as a longer prompt.

    Sampled text is never tokenized again. An episode's random numbers depend on its prompt, its index among the samples, and the
    number of its messages so far (see `PromptDraws.of_turns`).

    Weights must not change during a conversation, unless the engine allows `inflight_updates`. A turn that begins after an update
    uses the new weights, and each token records its weights.

    Args:
        sampler: Makes the messages.
        engine: As in `RolloutEngine.sample`, like tokenizer and request.
        tokenizer: See above.
        request: The first message of all B episodes.
        capacity: Most tokens of an episode after its prompt: sampled tokens and added tokens.

    Raises:
        ConfigError: If a prompt with an episode of this capacity exceeds the positions of the model or of the engine.
    """

    def __init__(
        self,
        sampler: RolloutEngine,
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        request: SamplingRequest,
        capacity: int,
    ) -> None:
        for ids in request.prompt_ids:
            sampler.check_prompt(getattr(engine.model, "config", None), len(ids), capacity)
        self._sampler, self._engine, self._tokenizer, self._capacity = sampler, engine, tokenizer, capacity
        self._request = replace(request, stops=request.stops or sampler.stops(tokenizer))
        # Tokens of each episode so far.
        self._own: list[list[int]] = [[] for _ in range(len(request.prompts) * request.samples_per_prompt)]
        self._messages = [0] * len(self._own)  # number of the policy's messages in each episode

    def first(self) -> Rollouts:
        """The first message of all B episodes."""
        limits = self._request.limits or [self._sampler.max_new_tokens] * len(self._own)
        request = replace(self._request, limits=[min(limit, self._capacity) for limit in limits])
        return self._recorded(range(len(self._own)), self._first(request))

    def next(self, rows: Sequence[int], added: Sequence[Sequence[int]]) -> Rollouts:
        """The next message of some episodes, with everything before it as its prompt; the others wait, and may continue later.

        Args:
            rows: Numbers of R episodes, ascending.
            added: Token ids to add after the last message of each.
        """
        assert list(rows) == sorted(set(rows)) and all(self._messages[row] for row in rows)
        for row, tokens in zip(rows, added, strict=True):
            self._own[row] += tokens
        begun, longest = self._request, self._sampler.max_new_tokens
        numbers = [row // begun.samples_per_prompt for row in rows]
        limits = [min(longest, self._capacity - len(self._own[row])) for row in rows]
        assert all(limit > 0 for limit in limits), "an episode without room for a token has ended"
        draws = begun.draws
        if isinstance(draws, PromptDraws):
            draws = draws.of_turns(rows, [self._messages[row] for row in rows])
        request = replace(
            begun,
            prompts=[begun.prompts[number] for number in numbers],
            prompt_ids=[[*begun.prompt_ids[number], *self._own[row]] for number, row in zip(numbers, rows, strict=True)],
            samples_per_prompt=1,
            draws=draws,
            limits=limits,
        )
        return self._recorded(rows, self._next(request, rows, added))

    def _recorded(self, rows: Sequence[int], turn: Rollouts) -> Rollouts:
        sequences = turn.sequences
        lengths = sequences.completion_mask.sum(dim=1).tolist()
        for row, tokens, length in zip(rows, sequences.completion_ids.tolist(), lengths, strict=True):
            self._own[row] += tokens[:length]
            self._messages[row] += 1
        return turn

    def _first(self, request: SamplingRequest) -> Rollouts:
        return self._sampler.sample(self._engine, self._tokenizer, request)

    def _next(self, request: SamplingRequest, rows: Sequence[int], added: Sequence[Sequence[int]]) -> Rollouts:
        return self._sampler.sample(self._engine, self._tokenizer, request)


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
