"""`Generation`: completions of a policy, and their rewards. There are two kinds:

OwnGeneration       the policy samples itself: completions are made when they are requested
EngineGeneration    an engine with a copy of the policy's weights makes them, perhaps elsewhere (`engine_generation.py`)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from hybrid_lightning.episodes.episodes import Episodes, has_failed
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.model.policy import Policy
from hybrid_lightning.rewards import ArrivingRewards, RewardFunction, evaluate_reward, extract_answers
from hybrid_lightning.rewards.combined import AnyReward, as_reward
from hybrid_lightning.rewards.reward_function import sum_counts
from hybrid_lightning.rollout.interface import Begun, Draws, SamplingRequest, Stops
from hybrid_lightning.rollout.rng import task_seeds
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.runner import autocast_dtype
from hybrid_lightning.sharding.ranks import gather_objects
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Completion, Message, Prompt, Rollout

Listen = Callable[[Sequence[Sequence[int]], int], Callable[[int, Sequence[int]], object] | None]  # see `Teacher.listen`


class Generation(ABC):
    """Completes prompts for a policy, and scores the completions.

    Args:
        policy: The policy.
        sampler: Makes the completions.
        reward: Scores the completions; None if nothing is completed.
        run: The run that trains or evaluates the policy.
        seed: Seed for the tasks of episodes if their rows have no seed.
        episodes: Plays the episodes of the policy; None if a completion is a single message.
    """

    inflight_updates = False  # whether completions in progress continue with new weights

    def __init__(
        self,
        policy: Policy,
        sampler: RolloutEngine,
        reward: AnyReward | None,
        run: Run,
        seed: int = 0,
        episodes: Episodes | None = None,
    ) -> None:
        self.policy, self.sampler, self.run = policy, sampler, run
        self.player = episodes or Episodes(None, None, policy.pretrained)
        self.episodes = self.player if self.player.has_turns else None
        self.reward = None if reward is None else as_reward(reward)
        self._seed = seed

    # ---- completions

    @abstractmethod
    def begin(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        draws: Draws,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
        listen: Listen | None = None,
        ahead: bool = False,
    ) -> Begun[Rollout]:
        """Begin to complete prompts with the current weights.

        See `SamplingRequest` for the arguments, and `update` for `ahead`; `listen` makes `on_tokens` from tokenized prompts.

        Raises:
            RolloutError: From this, or from the result, if an engine fails, or has other weights than the policy.
        """

    def _prepared(self, request: SamplingRequest, listen: Listen | None) -> tuple[SamplingRequest, list[int]]:
        """The request with tokens of its prompts, or, with an environment, a seed for the task of each."""
        if self.episodes is not None:
            return request, task_seeds(request.prompts, request.draws, self._seed)
        ids = [self.player.encode(prompt) for prompt in request.prompts]
        on_tokens = None if listen is None else listen(ids, request.samples_per_prompt)
        return replace(request, prompt_ids=ids, on_tokens=on_tokens), []

    @cached_property
    def _stops(self) -> Stops:
        """The stop tokens and stop strings; slow to build if there are stop strings."""
        return self.sampler.stops(self.policy.pretrained.tokenizer, self.player.stop_ids)

    def _tell(self, running: int, decoded: int) -> None:
        for listener in self.run.listeners:
            listener(running, decoded, self.sampler.max_new_tokens)

    def _by_weights_of(self, rollouts: Rollout, step: int) -> Rollout:
        """Rollout that record the weights which sampled each token: of this optimizer step, unless the engine says so."""
        if rollouts.sequences.weights_step is not None:
            return rollouts
        made_by = torch.full_like(rollouts.sequences.completion_ids, step)
        return replace(rollouts, sequences=replace(rollouts.sequences, weights_step=made_by))

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int = 1,
        draws: Draws = None,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> Rollout:
        """Complete prompts with the current policy: P * G sequences.

        Args:
            prompts: P prompts.
            samples_per_prompt: G; 1 if `greedy`.
            draws: Random generator on the model's device, or `PromptDraws` of these prompts.
            greedy: Take the most probable tokens instead of sampling.
            on_completion: See `SamplingRequest`; `arriving` makes one.

        Raises:
            RolloutError: If a rollout engine fails, or has different weights than the policy.
        """
        return self.begin(prompts, samples_per_prompt, draws, greedy, on_completion).result()

    @abstractmethod
    def update(self, ahead: bool = False) -> None:
        """Give the engines of several processes the policy's current weights, if they have a copy. All ranks must call this.

        Args:
            ahead: Whether completions in progress for a later rollout may continue with the new weights, if the engine allows
                it; if not, the update first waits for them.

        Raises:
            RolloutError: If the update fails on one rank.
        """

    @abstractmethod
    def gather_again(self, times: int) -> None:
        """Take part when other ranks complete prompts this many more times, if they gather weights for it."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Measurements of the last rollout."""

    @property
    def doubt(self) -> str:
        """Why completions of a rollout engine may not be the policy's, in words; "" if they are, or the policy makes them."""
        return ""

    @property
    def agreed(self) -> dict[str, float]:
        """How well each rollout engine has agreed with the policy in this run, for its checkpoints (see `Agreement.lowest`)."""
        return {}

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError if the engine cannot sample for this policy, before time is spent on the run."""

    def shut_down(self) -> None:
        """End completions in progress, and any rollout engine and environment processes that this process has started."""
        self.player.shut_down()

    # ---- rewards

    def arriving(self, prompts: Sequence[Prompt], samples_per_prompt: int) -> ArrivingRewards:
        """A scorer for G completions of each prompt while others are still being generated, for `generate` and `score`."""
        assert self.reward is not None
        return ArrivingRewards(self.reward, repeat_prompts(prompts, samples_per_prompt))

    def score(self, rollout: Rollout, arriving: ArrivingRewards | None = None) -> Rollout:
        """Add rewards to a rollout, on its device; `arriving` may have begun to score it."""
        assert self.reward is not None
        prompts = repeat_prompts(rollout.prompts, rollout.group_size)
        counted = None if self.episodes is None else [not has_failed(completion) for completion in rollout.completions]
        with self.run.interruptible():
            rewards = evaluate_reward(self.reward, rollout.completions, prompts, counted, arriving)
        in_groups = rewards.apply(lambda values: values.view(len(rollout.prompts), -1))
        return replace(rollout, rewards=in_groups.to(rollout.sequences.completion_ids.device))

    def answers(self, rollout: Rollout) -> list[str | None]:
        """The answer that the reward finds in each completion, or None (see `RewardFunction.extract_answer`)."""
        assert self.reward is not None
        return extract_answers(self.reward, rollout.completions, repeat_prompts(rollout.prompts, rollout.group_size))

    def reward_counts(self) -> dict[str, float]:
        """Counts of the reward since the last call, such as calls of a judge, over all ranks. All ranks must call this."""
        own = sum_counts(term.take_counts() for term in self.reward_terms())
        return sum_counts(gather_objects(own)) if own else own

    def reward_terms(self) -> list[RewardFunction]:
        """The rewards in the reward's weighted sum; none without a reward."""
        return [] if self.reward is None else [term for term, _ in self.reward.terms()]

    @property
    def measures_correctness(self) -> bool:
        """Whether a term of the reward measures correctness; if not, there is no accuracy."""
        return any(term.measures_correctness for term in self.reward_terms())

    # ---- prompts

    def encode(self, prompt: Prompt, begun: Sequence[Message] = ()) -> list[int]:
        """Token ids of a prompt (see `Episodes.encode`)."""
        return self.player.encode(prompt, begun)

    @property
    def limits(self) -> dict[str, int]:
        """The options that limit a completion, with their values: of a message and, with an environment, of a whole episode."""
        message = {"model.sampler.max_new_tokens": self.sampler.max_new_tokens}
        return message if self.episodes is None else message | {"model.episodes.max_tokens": self.episodes.limits.max_tokens}

    @property
    def max_completion_tokens(self) -> int:
        """Tokens of the longest completion: a message or a whole episode."""
        return list(self.limits.values())[-1]

    def check_encoding(self, prompts: Sequence[Prompt]) -> None:
        """Check that the first prompt of each set can be rendered and tokenized, and that there is room for all completions.

        Raises:
            ConfigError: If a prompt with its longest completion is too long for the model, or for the engine.
        """
        limit, name = self.sampler.context(self.policy.pretrained.config)
        if self.player.agent is not None:  # which may ask for anything; a request that is too long is refused
            for prompt in {prompt.set_name: prompt for prompt in reversed(prompts)}.values():
                self.encode(prompt)
            return
        self.check_lengths(prompts, math.inf if self.reward is None else limit, name)  # without a reward nothing is completed
        if self.episodes is not None and self.episodes.environment is not None:
            self.episodes.turns.check(prompts, self.episodes.environment.added_roles())

    def check_lengths(self, prompts: Sequence[Prompt], limit: float, name: str, seen: str = "", shorten: str = "") -> None:
        """Raise ConfigError if a prompt with its longest completion has more tokens than `limit`.

        In the message, `name` is the name of the limit, `seen` follows "too long", and `shorten` replaces the remedy
        `data.max_prompt_tokens`.
        """
        firsts = {prompt.set_name: prompt for prompt in reversed(prompts)}
        tokens = {name: len(self.encode(prompt)) for name, prompt in firsts.items()}
        option, longest = list(self.limits.items())[-1]
        room = limit - longest
        # A text has no more tokens than bytes, and the first prompt already includes what the template adds.
        unsure = [prompt for prompt in prompts if tokens[prompt.set_name] + _text_bytes(prompt) > room]
        lengths = [len(self.encode(prompt)) for prompt in unsure]
        long = [place for place, length in enumerate(lengths) if length > room]
        if not long:
            return
        first, most, remedies = long[0], int(limit) - max(lengths), [shorten] if shorten else []
        if len(long) < len(prompts) and not shorten:
            remedies += [f"set data.max_prompt_tokens={room:g} to drop them"]
        if most > 0:
            remedies += [f"lower {option} to {most} or less"]
        raise ConfigError(
            f"{len(long)} of {len(prompts)} prompts are too long{seen}, first {unsure[first].place} with {lengths[first]} tokens"
            f": {option}={longest} leaves {max(0, int(room))} of {name}; "
            f"{', or '.join(remedies) or 'give shorter prompts, or use another model'}"
        )


class OwnGeneration(Generation):
    """The policy samples itself, in this process."""

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        draws: Draws,
        greedy: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
        listen: Listen | None = None,
        ahead: bool = False,
    ) -> Begun[Rollout]:
        """Complete prompts now."""
        policy, step = self.policy, self.run.step
        request = SamplingRequest(prompts, (), samples_per_prompt, draws, greedy, self._stops, on_token=self._tell)
        request, seeds = self._prepared(replace(request, on_completion=on_completion), listen)

        def play() -> Begun[Rollout]:
            # A signal may interrupt this, since no other rank waits for this one in the meantime.
            with self.run.interruptible(), policy.runner.sampling(autocast_dtype(policy.device)):
                return self.player.begin(self.sampler, policy.runner, request, seeds)

        with policy.inference():
            begun = policy.weights.gathered(play)
        return begun.then(lambda rollout: self._by_weights_of(rollout, step))

    def update(self, ahead: bool = False) -> None:
        """Do nothing."""

    def gather_again(self, times: int) -> None:
        """See `Generation`."""
        for _ in range(times):
            self.policy.weights.gathered(lambda: None)

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def check(self) -> None:
        """Accept every policy."""


def _text_bytes(prompt: Prompt) -> int:
    texts = [prompt.text or "", *(str(message["content"]) for message in prompt.messages or ())]
    return sum(len(text.encode()) for text in texts)


def repeat_prompts(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """The prompt of each completion, for `samples` completions of every prompt in prompt-major order."""
    return [prompt for prompt in prompts for _ in range(samples)]
