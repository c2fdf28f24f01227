"""`RolloutEngine`: the interface by which the policy, its evaluation and its calibration get completions of prompts.

Prompts go in as token ids and completions come out as token ids, so that nothing is tokenized twice. With each token comes its
log-probability under softmax(logits / temperature), without the truncation by top-k and top-p. The model is an argument of every
call: an engine keeps no weights, which training would make stale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt, Rollouts

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import


@dataclass(frozen=True)
class Stops:
    """What ends a completion."""

    ids: tuple[int, ...]  # stop tokens
    strings: StopStringCriteria | None  # recognises stop strings; slow to make, since it looks at the whole vocabulary


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
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.stop = tuple(stop)

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None) -> Stops:
        """Make what ends a completion. That is slow where there are stop strings, so callers that sample often make it once.

        Args:
            tokenizer: The policy's tokenizer.
            ids: Token ids that end a completion; None takes the tokenizer's end-of-sequence token.
        """
        strings = StopStringCriteria(tokenizer, list(self.stop)) if self.stop else None
        return Stops(tuple(ids or [int(tokenizer.eos_token_id)]), strings)

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

        Returns:
            Rollouts of B = P * G sequences, on the model's device.

        Raises:
            ConfigError: If the longest prompt with a completion of `max_new_tokens` exceeds the model's positions.
        """


def check_positions(config: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError if a prompt with its longest completion exceeds the positions of a model.

    Args:
        config: The model's config.
        prompt_tokens: Tokens of the prompt.
        max_new_tokens: Tokens of the longest completion.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions; lower "
            "data.max_prompt_tokens or sampler.max_new_tokens"
        )
