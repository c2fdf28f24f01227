"""`Conversation`: episodes that go on, turn by turn, with what an environment has added to them.

    conversation = sampler.conversation(engine, tokenizer, prompts, prompt_ids, 8, capacity=512)
    turn = conversation.first(draws)                    the first message of every episode
    turn = conversation.next([0, 3], [[5, 6], [7]], draws)      the next one of those that go on, behind what was added

What was sampled is never tokenized again. An episode's random numbers depend on its prompt, its number among the samples, and how
many messages it has had (see `PromptDraws.of_turns`).

Axes: P prompts, G samples per prompt, B = P * G episodes, R of them that go on, T tokens of the longest message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import
    from hybrid_lightning.rollout.rollout_engine import RolloutEngine, Stops

Draws = torch.Generator | PromptDraws | None


@dataclass(frozen=True)
class Turn:
    """One message of each of R episodes, as the policy has sampled it."""

    tokens: Tensor  # [R, T] int64, right-padded; with the stop token
    logprobs: Tensor  # [R, T] float32, as in `Rollouts`
    lengths: Tensor  # [R] int64, tokens of each
    finished: Tensor  # [R] bool: True if a stop token or string ended it, False if it was cut at its limit
    weights_step: Tensor | None = None  # [R, T] as in `Sequences`; None: the weights were the same in the whole conversation


class Conversation:
    """Episodes by any rollout engine: the context of a message is given to it as a longer prompt.

    Weights must not change while they last, unless the engine goes on with others (`inflight_updates`): a turn that is begun after
    an update is by the new ones, and each token says by which.

    Args:
        sampler: Makes the messages.
        engine: As in `RolloutEngine.sample`; so are the other arguments that are not named here.
        tokenizer: Gives the token that fills up rows.
        prompts: P prompts.
        prompt_ids: Token ids of the prompts.
        samples_per_prompt: Episodes of each prompt (G).
        capacity: Most tokens of an episode behind its prompt: those sampled, and those that are added.
        greedy: Take the most probable token instead of sampling.
        stops: What ends a message; None makes it for this conversation.
        on_token: Called after every token of a turn.

    Raises:
        ConfigError: If a prompt with an episode of this capacity exceeds the model's positions, or those of the engine.
    """

    def __init__(
        self,
        sampler: "RolloutEngine",
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        capacity: int,
        greedy: bool = False,
        stops: "Stops | None" = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> None:
        for ids in prompt_ids:
            sampler.check_prompt(getattr(engine.model, "config", None), len(ids), capacity)
        self._sampler, self._engine, self._tokenizer, self._capacity = sampler, engine, tokenizer, capacity
        self._prompts, self._prompt_ids, self._samples = prompts, prompt_ids, samples_per_prompt
        self._greedy, self._stops, self._on_token = greedy, stops or sampler.stops(tokenizer), on_token
        self._own: list[list[int]] = [[] for _ in range(len(prompts) * samples_per_prompt)]  # each episode's tokens so far
        self._messages = [0] * len(self._own)  # of the policy, in each episode

    def first(self, generator: Draws = None, limits: Sequence[int] | None = None) -> Turn:
        """The first message of all B episodes: what `RolloutEngine.sample` gives.

        Args:
            generator: As in `RolloutEngine.sample`.
            limits: Most tokens of the messages of each prompt, [P]; None for `max_new_tokens`. The capacity is a limit, too.
        """
        limits = self._within([0] * len(self._prompts), limits)
        return self._noted(range(len(self._own)), self._first(generator, limits))

    def next(
        self, rows: Sequence[int], added: Sequence[Sequence[int]], generator: Draws = None, limits: Sequence[int] | None = None
    ) -> Turn:
        """The next message of some episodes. The others wait, and may go on later.

        Args:
            rows: Numbers of R episodes, ascending.
            added: Token ids that come behind the last message of each.
            generator: As in `first`; `PromptDraws` are those of all P prompts.
            limits: Most tokens of each message, [R]; None for `max_new_tokens`. What is left of the capacity is a limit, too.
        """
        assert list(rows) == sorted(set(rows)) and all(self._messages[row] for row in rows)
        for row, tokens in zip(rows, added, strict=True):
            self._own[row] += tokens
        limits = self._within([len(self._own[row]) for row in rows], limits)
        if isinstance(generator, PromptDraws):
            generator = generator.of_turns(rows, [self._messages[row] for row in rows])
        return self._noted(rows, self._next(rows, added, generator, limits))

    def _within(self, lengths: Sequence[int], limits: Sequence[int] | None) -> list[int]:
        limits = [self._sampler.max_new_tokens] * len(lengths) if limits is None else limits
        found = [min(limit, self._capacity - length) for limit, length in zip(limits, lengths, strict=True)]
        assert all(limit > 0 for limit in found), "an episode without room for a token has ended"
        return found

    def _noted(self, rows: Sequence[int], turn: Turn) -> Turn:
        for row, tokens, length in zip(rows, turn.tokens.tolist(), turn.lengths.tolist(), strict=True):
            self._own[row] += tokens[:length]
            self._messages[row] += 1
        return turn

    def _first(self, generator: Draws, limits: Sequence[int]) -> Turn:
        return self._sample(self._prompts, self._prompt_ids, self._samples, generator, limits)

    def _next(self, rows: Sequence[int], added: Sequence[Sequence[int]], generator: Draws, limits: Sequence[int]) -> Turn:
        numbers = [row // self._samples for row in rows]
        contexts = [[*self._prompt_ids[number], *self._own[row]] for number, row in zip(numbers, rows, strict=True)]
        return self._sample([self._prompts[number] for number in numbers], contexts, 1, generator, limits)

    def _sample(
        self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], samples: int, generator: Draws, limits: Sequence[int]
    ) -> Turn:
        options: Any = {"greedy": self._greedy, "stops": self._stops, "on_token": self._on_token}
        arguments = (self._engine, self._tokenizer, prompts, ids, samples)
        made = self._sampler.sample(*arguments, generator=generator, limits=limits, **options)
        lengths = made.sequences.completion_mask.sum(dim=1)
        return Turn(made.sequences.completion_ids, made.sampling_logprobs, lengths, made.finished, made.sequences.weights_step)
