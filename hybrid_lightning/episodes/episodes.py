"""`Episodes`: plays the episodes of rollouts, and joins them to rows.

An episode is one row of a rollout. Its completion holds sampled and added tokens as token ids; a mask marks the sampled ones.
Episodes are independent of each other (`episode.py`); the rollout engine decides when their messages are sampled
(`rollout/playing.py`).

Axes: P prompts, G episodes of each, B = P * G episodes in prompt-major order, T completion tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid_lightning.environments import CUT_MARK, Environment, EpisodeLimits, RunningEpisodes
from hybrid_lightning.episodes.episode import Group, LiveEpisode, Rules
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, shorten
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.batching import pad_left, pad_right, pad_token, pad_values
from hybrid_lightning.rollout.interface import Begun, SamplingRequest
from hybrid_lightning.rollout.playing import NOTHING, Surroundings
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.sharding.ranks import gather_objects
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.types import Completion, Message, Prompt, Rollout, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner  # PEFT is slow to import

ENDS = ("answered", "over", "turns", "tokens", "time", "failed")  # see `Episode.end`


class Episodes:
    """Plays the episodes of a policy.

    Args:
        environment: The object in the config; each episode gets its own. None if an episode is a single message.
        limits: Limits of episodes with an environment; None for `EpisodeLimits()`.
        pretrained: The policy's tokenizer and templates.
        turn_template: How to write messages after a plain-text prompt; None for the default.
        turn_rewards: Whether the reward of each turn counts by itself (see `Environment.turn_rewards`).

    Raises:
        ConfigError: If there are options of episodes without an environment.
    """

    def __init__(
        self,
        environment: Environment | None,
        limits: EpisodeLimits | None,
        pretrained: Pretrained,
        turn_template: str | None = None,
        turn_rewards: bool = False,
    ) -> None:
        for name, value in (("episodes", limits), ("turn_template", turn_template)):
            if environment is None and value is not None:
                raise ConfigError(f"model.{name} needs model.environment, which is not set; set it, or remove model.{name}")
        self.environment, self.limits, self.pretrained = environment, limits or EpisodeLimits(), pretrained
        self._turn_template, self._turn_rewards = turn_template, turn_rewards
        self._idle: list[RunningEpisodes] = []  # of rollouts that have ended

    @cached_property
    def turns(self) -> TurnEncoder:
        """Encoder of the messages that environments add."""
        assert self.environment is not None
        pretrained, given = self.pretrained, {} if self._turn_template is None else {"turn_template": self._turn_template}
        with in_user_code(self.environment, "prepare"):
            self.environment.prepare(pretrained.encoder.chat_template or pretrained.tokenizer.chat_template)
        with in_user_code(self.environment, "tools"):
            tools = self.environment.tools()
        if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
            name = type(self.environment).__name__
            raise ConfigError(f"{name}.tools returned {shorten(tools)}; it must return a list of JSON schemas, as dicts")
        return TurnEncoder(pretrained.encoder, pretrained.stop_ids, tools, tools_of=self._tools_of, **given)

    def _tools_of(self, prompt: Prompt) -> list[dict[str, Any]]:
        assert self.environment is not None
        with in_user_code(self.environment, "tools_of"):
            return self.environment.tools_of(prompt)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are skipped when a message is decoded."""
        tokenizer = self.pretrained.tokenizer
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        return frozenset(added.union(tokenizer.all_special_ids))

    @cached_property
    def cut_mark(self) -> str:
        """What is written after a cut text: nothing, if the tokenizer cannot write the mark."""
        return CUT_MARK if self.turns.can_write(CUT_MARK) else ""

    @cached_property
    def _elsewhere(self) -> "Episodes":
        """A copy with its own tokenizer, for the event loop while this process continues."""
        options = self.pretrained.clone_for_thread(), self._turn_template, self._turn_rewards
        return Episodes(self.environment, self.limits if self.environment else None, *options)

    @property
    def stop_ids(self) -> Sequence[int]:
        """Tokens that end a message."""
        return self.pretrained.stop_ids if self.environment is None else self.turns.stop_ids

    def encode(self, prompt: Prompt, begun: Sequence[Message] = ()) -> list[int]:
        """Token ids of a prompt, rendered by the chat template if it has messages.

        The prompt of an episode also has the tools, and the environment's first messages (`begun`).
        """
        return self.pretrained.encoder.encode(prompt) if self.environment is None else self.turns.first(prompt, begun)[0]

    def shut_down(self) -> None:
        """End the processes of environments; they start again when needed."""
        for environments in self._idle:  # others end with this process
            environments.close()
        self._idle = []

    def begin(
        self, sampler: RolloutEngine, runner: "ModelRunner", request: SamplingRequest, seeds: Sequence[int] = ()
    ) -> Begun[Rollout]:
        """Play G episodes of each prompt; see `RolloutEngine.play` for when.

        Args:
            sampler: Makes the messages.
            runner: See `RolloutEngine.play`.
            request: The prompts and how to sample; with their tokens if there is no environment.
            seeds: A seed for the task of each prompt, for an environment.

        Raises:
            RolloutError: If the engine fails, too many environments fail, or the episodes of a group begin differently.
        """
        on_completion, on_tokens = request.on_completion, request.on_tokens

        def tell(episode: LiveEpisode, completion: Completion) -> None:
            if on_completion is not None:
                on_completion(episode.number, completion)
            if on_tokens is not None:
                on_tokens(episode.number, episode.ids)

        environments, around, capacity, samples = None, NOTHING, None, request.samples_per_prompt
        groups = (
            [Group(prompt, seed=seed) for prompt, seed in zip(request.prompts, seeds, strict=True)]
            if seeds
            else [Group(prompt, ids=list(ids)) for prompt, ids in zip(request.prompts, request.prompt_ids, strict=True)]
        )
        if self.environment is not None:
            environments = self._idle.pop() if self._idle else RunningEpisodes(self.environment, self.limits, self._turn_rewards)
            environments.begin(len(request.prompts) * samples)
            around, capacity = self._around(environments), self.limits.max_tokens
            request = replace(request, on_completion=None, on_tokens=None)
        own = self._elsewhere if sampler.is_remote else self
        rules = Rules(sampler.max_new_tokens, sampler.stop, tell, environments, own)
        every = [group for group in groups for _ in range(samples)]
        rules.episodes.extend(LiveEpisode(number, group, rules) for number, group in enumerate(every))
        begun = sampler.play(runner, own.pretrained.tokenizer, request, list(rules.episodes), capacity, around)
        return begun.then(lambda _: self._rollout(request, rules.episodes, next(runner.model.parameters()).device))

    def _around(self, environments: RunningEpisodes) -> Surroundings:
        async def finish() -> None:
            await environments.finish()
            self._idle.append(environments)

        return Surroundings(environments.blocked_s, None if self.limits.workers else environments.process_kept, finish)

    def _rollout(self, request: SamplingRequest, episodes: Sequence[LiveEpisode], device: torch.device) -> Rollout:
        pad, samples = pad_token(self.pretrained.tokenizer), request.samples_per_prompt
        # Of a group in which all environments failed, only the prompt is known.
        ids = [each.group.ids or self.encode(each.group.prompt) for each in episodes[::samples]]
        prompt_ids, prompt_mask = (part.repeat_interleave(samples, dim=0) for part in pad_left(ids, pad, device))
        completion_ids, completion_mask = pad_right([each.ids for each in episodes], pad, device)
        steps, sampled = None, completion_mask
        if any(each.steps for each in episodes):
            steps = pad_values([each.steps for each in episodes], 0, torch.long, device)
        if not all(all(each.sampled) for each in episodes):
            sampled = pad_values([each.sampled for each in episodes], False, torch.bool, device)
        logprobs = pad_values([each.logprobs for each in episodes], 0.0, torch.float32, device)
        sequences = Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask, steps, sampled)
        completions = tuple(each.completion() for each in episodes)
        return Rollout(tuple(request.prompts), completions, sequences, logprobs)


def token_advantages(rollout: Rollout) -> Tensor | None:
    """The advantage of its turn for each sampled token, [R, T], 0 for the others; None if advantages are not by turn.

    The tokens of an episode's turns are the sampled tokens of its rows, in order.
    """
    advantages, sampled = rollout.advantages, rollout.sequences.sampled_mask
    assert advantages is not None, "estimated before"
    if advantages.dim() == 2:
        return None
    lengths = torch.zeros(len(rollout.completions), advantages.shape[2], dtype=torch.long)
    for number, completion in enumerate(rollout.completions):
        assert completion.episode is not None, "made by `LiveEpisode.completion`"
        own = completion.episode.lengths
        lengths[number, : len(own)] = torch.tensor(own)
    result = advantages.new_zeros(sampled.shape)
    result[sampled] = advantages.flatten().repeat_interleave(lengths.flatten().to(sampled.device))
    return result


def begun_with(rollout: Rollout, number: int) -> list[Message]:
    """The messages that the environment added to a prompt before the first turn; empty without episodes."""
    samples, prompt = rollout.group_size, rollout.prompts[number]
    asked = list(prompt.messages or [{"role": "user", "content": prompt.text}])
    for completion in rollout.completions[number * samples : (number + 1) * samples]:
        if completion.episode is not None and completion.episode.end != "failed":
            messages = list(completion.episode.messages)
            place = next(n for n in range(len(messages)) if messages[n : n + len(asked)] == asked)
            rest = takewhile(lambda message: message["role"] != "assistant", messages[place + len(asked) :])
            return [*messages[:place], *rest]
    return []


def has_failed(completion: Completion) -> bool:
    """Whether a completion is an episode that is left out because its environment failed."""
    return completion.episode is not None and completion.episode.end == "failed"


def episode_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Compute the metrics of one rollout's episodes over all ranks, from this rank's completions. All ranks must call this.

    Returns:
        `episodes/end/{reason}`, shares of all episodes (see `Episode.end`). Also means over the episodes that did not fail:
        `episodes/turns`, `episodes/return` (sum of the environment's rewards), and the environment's counts, such as
        `episodes/calls`.
    """
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    own = [(episode.end, {**episode.counts, "turns": episode.turns, "return": sum(episode.rewards)}) for episode in episodes]
    every = [values for of_rank in gather_objects(own) for values in of_rank]
    ends = Counter(end for end, _ in every)
    kept = [values for end, values in every if end != "failed"]
    names = {name for values in kept for name in values}
    shares = {f"episodes/end/{reason}": ends[reason] / len(every) for reason in ENDS}
    return {f"episodes/{name}": sum(float(values.get(name, 0)) for values in kept) / len(kept) for name in sorted(names)} | shares


def episode_records(rollout: Rollout, greedy: bool = False) -> list[dict[str, Any]]:
    """One record per episode, ready for JSON; in greedy records, one per prompt, `sample` is None."""
    sequences, rewards, records = rollout.sequences, rollout.scored, []
    for number, completion in enumerate(rollout.completions):
        place = divmod(number, rollout.group_size)
        episode, prompt = completion.episode, rollout.prompts[place[0]]
        assert episode is not None, "made by `LiveEpisode.completion`"
        row = rollout.first_row(number)
        real = sequences.completion_mask[row]
        records.append(
            {
                "set": prompt.set_name,
                "index": prompt.index,
                "sample": None if greedy else place[1],
                "answer": prompt.answer,
                "messages": [dict(message) for message in episode.messages],
                "end": episode.end,
                "turn_rewards": list(episode.rewards),
                "counts": dict(episode.counts),
                "reward": float(rewards.total[place]),
                "reward_parts": {name: float(part[place]) for name, part in rewards.parts.items()},
                "correct": rewards.right(*place),
                "prompt_ids": sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist(),
                "completion_ids": sequences.completion_ids[row][real].tolist(),
                "sampled": sequences.sampled_mask[row][real].tolist(),
                "logprobs": rollout.sampling_logprobs[row][real].tolist(),
                "columns": prompt.columns,
            }
        )
    return records
