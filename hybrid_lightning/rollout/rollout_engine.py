"""`RolloutEngine`: what makes completions of prompts. The policy, its evaluation and its calibration know this interface alone.

Prompts come as token ids and completions leave as token ids, so that nothing is tokenized twice, with the log-probability of each
token under softmax(logits / temperature), however top-k and top-p truncate what is drawn from. What an engine samples from is
handed to it at each call: it keeps no weights that another call could find stale.
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

    ids: tuple[int, ...]  # tokens
    strings: StopStringCriteria | None  # finds the stop strings, by a look at every token of the vocabulary


class RolloutEngine(Configurable, ABC):
    """Makes completions; a subclass says how.

    Args:
        max_new_tokens: Longest completion in tokens; one that reaches it without a stop token counts as not finished.
        temperature: Divides the logits; must be positive. Greedy decoding is a method's argument, since training with it
            would have no exploration.
        top_p: Smallest set of tokens whose probability reaches this is kept; 1 keeps all.
        top_k: Number of most probable tokens kept; 0 keeps all.
        stop: Strings that end a completion. The tokens of the string stay in the sequence, the text is cut before it.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"sampler.max_new_tokens must be at least 1, got {max_new_tokens}")
        if not temperature > 0:
            raise ConfigError(f"sampler.temperature must be positive, got {temperature}; 1.0 samples from the policy itself")
        if not 0 < top_p <= 1:
            raise ConfigError(f"sampler.top_p must be in (0, 1], got {top_p}; 1 keeps all tokens")
        if top_k < 0:
            raise ConfigError(f"sampler.top_k must not be negative, got {top_k}; 0 keeps all tokens")
        if isinstance(stop, str):
            raise ConfigError(f"sampler.stop must be a list of strings, got the string {stop!r}; write [{stop!r}]")
        if any(not text for text in stop):
            raise ConfigError("sampler.stop holds an empty string, which would end every completion at once; remove it")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.stop = tuple(stop)

    def stops(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | None = None) -> Stops:
        """What ends a completion. It takes long where there are stop strings: who samples often makes it once.

        Args:
            tokenizer: Of the policy.
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
            engine: Of a causal language model, which the caller puts into eval mode.
            tokenizer: Decodes the completions; its end-of-sequence token ends them.
            prompts: P prompts, for the record in the result.
            prompt_ids: Their token ids.
            samples_per_prompt: G.
            generator: Source of randomness: a generator on the model's device, or `PromptDraws` of these prompts; None takes
                torch's global generator.
            greedy: Take the most probable token instead of sampling (`samples_per_prompt` must then be 1).
            stops: What ends a completion, made by the method of that name; None makes it for this call alone.
            on_token: Called after every token with (sequences still running, tokens decoded), for progress bars; what it
                raises ends the sampling.

        Returns:
            Rollouts of B = P * G sequences, on the model's device.

        Raises:
            ConfigError: If the longest prompt and completion do not fit into the model's positions.
        """


def check_positions(config: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError unless a prompt and its completion fit into the positions of a model.

    Args:
        config: Of the model.
        prompt_tokens: Of the prompt.
        max_new_tokens: Longest completion.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions; lower "
            "data.max_prompt_tokens or sampler.max_new_tokens"
        )
