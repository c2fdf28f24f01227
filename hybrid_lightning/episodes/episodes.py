"""`Episodes`: plays the episodes of rollouts, and joins them to rows.

An episode is one row of a rollout. Its completion holds sampled and added tokens as token ids; a mask marks the sampled ones.
Episodes are independent of each other (`episode.py`); the rollout engine decides when their messages are sampled
(`rollout/playing.py`).

Axes: P prompts, G episodes of each, B = P * G episodes in prompt-major order, T completion tokens.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from hybrid_lightning.agents import Agent
from hybrid_lightning.agents.agent import HERE
from hybrid_lightning.agents.endpoint import Endpoint
from hybrid_lightning.environments import CUT_MARK, Environment, EpisodeLimits, RunningEpisodes
from hybrid_lightning.environments.running import BLOCKED_S, Faults, process_kept
from hybrid_lightning.episodes.agent_episode import AgentEpisode, AgentRules, Conversations
from hybrid_lightning.episodes.episode import Group, LiveEpisode, Rules
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, shorten
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.batching import pad_left, pad_right, pad_token, pad_values
from hybrid_lightning.rollout.interface import Begun, Sampled, SamplingRequest
from hybrid_lightning.rollout.playing import NOTHING, Surroundings
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.sharding.ranks import gather_objects, rank
from hybrid_lightning.shared.user_calls import CallThreads
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.types import Completion, Message, Prompt, Rollout, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner  # PEFT is slow to import

logger = logging.getLogger(__name__)
ENDS = ("answered", "over", "turns", "tokens", "time", "failed")  # see `Episode.end`


class Episodes:
    """Plays the episodes of a policy.

    Args:
        environment: The object in the config; each episode gets its own. None without one.
        limits: Limits of episodes with an environment or an agent; None for `EpisodeLimits()`.
        pretrained: The policy's tokenizer and templates.
        turn_template: How to write messages after a plain-text prompt; None for the default.
        turn_rewards: Whether the reward of each turn counts by itself (see `Environment.turn_rewards`).
        agent: Plays the episodes in place of an environment. With neither, an episode is a single message.
        needs_number: Whether nothing but the agent gives a reward.

    Raises:
        ConfigError: If there are options of episodes without an environment or an agent, or if there are both.
    """

    def __init__(
        self,
        environment: Environment | None,
        limits: EpisodeLimits | None,
        pretrained: Pretrained,
        turn_template: str | None = None,
        turn_rewards: bool = False,
        agent: Agent | None = None,
        needs_number: bool = False,
    ) -> None:
        if environment is not None and agent is not None:
            raise ConfigError(
                "model.agent and model.environment are both set; an episode is played by one of them, so remove one"
            )
        for name, value in (("episodes", limits), ("turn_template", turn_template)):
            if environment is None and agent is None and value is not None:
                raise ConfigError(
                    f"model.{name} needs model.environment or model.agent, and neither is set; set one, or remove model.{name}"
                )
        self.agent, self._needs_number = agent, needs_number
        self._endpoint: Endpoint | None = None
        self._warned: set[str] = set()
        self.environment, self.limits, self.pretrained = environment, limits or EpisodeLimits(), pretrained
        self._turn_template, self._turn_rewards = turn_template, turn_rewards
        self._idle: list[RunningEpisodes] = []  # of rollouts that have ended

    @property
    def has_turns(self) -> bool:
        """Whether an episode has several messages of the policy, with an environment or an agent."""
        return self.environment is not None or self.agent is not None

    @property
    def player(self) -> str:
        """Name of the environment or the agent, for messages."""
        return self.agent.name if self.agent is not None else type(self.environment).__name__

    @cached_property
    def turns(self) -> TurnEncoder:
        """Encoder of the messages that environments add."""
        pretrained = self.pretrained
        if self.environment is None:
            return TurnEncoder(pretrained.encoder, pretrained.stop_ids, turn_template=self._turn_template)
        with in_user_code(self.environment, "prepare"):
            self.environment.prepare(pretrained.encoder.chat_template or pretrained.tokenizer.chat_template)
        with in_user_code(self.environment, "tools"):
            tools = self.environment.tools()
        if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
            name = type(self.environment).__name__
            raise ConfigError(f"{name}.tools returned {shorten(tools)}; it must return a list of JSON schemas, as dicts")
        return TurnEncoder(pretrained.encoder, pretrained.stop_ids, tools, self._turn_template, self._tools_of)

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
        options = self.pretrained.clone_for_thread(), self._turn_template, self._turn_rewards, self.agent
        return Episodes(self.environment, self.limits if self.has_turns else None, *options)

    @property
    def stop_ids(self) -> Sequence[int]:
        """Tokens that end a message."""
        return self.turns.stop_ids if self.has_turns else self.pretrained.stop_ids

    @cached_property
    def conversations(self) -> Conversations:
        """Writes and reads the conversations of agents."""
        assert self.agent is not None
        return Conversations(self.pretrained, self.agent.call_format, self._turn_template, self.special_ids)

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
        if self._endpoint is not None:
            self._endpoint.stop()
            self._endpoint = None

    def check_agent(self, remote: bool) -> None:
        """Make sure, before time is spent on a run, that the agent can be started; say once where it is served.

        `remote` is True if servers sample.

        Raises:
            ConfigError: If it cannot.
        """
        agent, endpoint = self.agent, self.endpoint
        assert agent is not None
        agent.check()
        _ = self.conversations.call_format
        if "start" in self._warned:
            return
        self._warned.add("start")
        where = endpoint.base_url
        if agent.host not in (HERE, "localhost", "::1"):
            where += (
                f", open to whoever reaches {agent.host} port {endpoint.port} and has the key of an episode, without encryption"
            )
        repeats = "a run repeats itself to the bit if the agent does"
        if remote:
            repeats = "servers sample, so a run does not repeat itself"
        elif agent.is_threaded:
            repeats += " and waits for each message before it asks for another"
        rank_zero_info(f"Agent {agent.name}: {agent.concurrency} at once, served at {where}; {repeats}")

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint of this process."""
        assert self.agent is not None
        if self._endpoint is None:
            self._endpoint = Endpoint(self.agent, rank())
        return self._endpoint

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

        if self.agent is not None:
            return self._begin_agents(self.agent, sampler, runner, request)

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

    def _begin_agents(
        self, agent: Agent, sampler: RolloutEngine, runner: "ModelRunner", request: SamplingRequest
    ) -> Begun[Rollout]:
        config, own = getattr(runner.model, "config", None), self._elsewhere
        on_completion, request = request.on_completion, replace(request, on_completion=None, on_tokens=None)
        faults, threads = Faults(self.limits, "agent", "agent.timeout_s", hopeless=True), CallThreads()
        faults.begin(len(request.prompts) * request.samples_per_prompt)

        def warn(kind: str, text: str) -> None:
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("%s", text)

        def tell(episode: AgentEpisode, completion: Completion) -> None:
            if on_completion is not None:
                on_completion(episode.number, completion)

        def version(message: Sampled) -> str:
            return f"step-{message.steps[-1]}" if message.steps else str(getattr(sampler, "version", None) or "policy")

        rules = AgentRules(
            agent=agent,
            endpoint=self.endpoint,
            conversations=own.conversations,
            limits=self.limits,
            faults=faults,
            max_new_tokens=sampler.max_new_tokens,
            context=sampler.context(config)[0],
            stop=sampler.stop,
            needs_number=self._needs_number,
            version=version,
            on_end=tell,
            warn=warn,
            threads=threads,
        )
        episodes = [
            AgentEpisode(place * request.samples_per_prompt + sample, prompt, _row_of(prompt), rules)
            for place, prompt in enumerate(request.prompts)
            for sample in range(request.samples_per_prompt)
        ]

        async def finish() -> None:
            threads.close()

        drew = (
            f"the agent {agent.name}, or a package that it uses, draws from the global random generators of Python, NumPy or "
            "torch, which all agents share; if what it asks depends on them, give it its own"
        )
        kept = None if sampler.is_remote else partial(process_kept, lambda: warn("global generators", drew))
        around = Surroundings(max(BLOCKED_S, agent.timeout_s), kept, finish, agent.concurrency)
        tokenizer = own.pretrained.tokenizer if sampler.is_remote else self.pretrained.tokenizer
        begun = sampler.play(runner, tokenizer, request, episodes, self.limits.max_tokens, around)
        return begun.then(lambda _: self._rollout(request, episodes, next(runner.model.parameters()).device))

    def _around(self, environments: RunningEpisodes) -> Surroundings:
        async def finish() -> None:
            await environments.finish()
            self._idle.append(environments)

        return Surroundings(environments.blocked_s, None if self.limits.workers else environments.process_kept, finish)

    def _rollout(
        self, request: SamplingRequest, episodes: Sequence[LiveEpisode] | Sequence[AgentEpisode], device: torch.device
    ) -> Rollout:
        pad = pad_token(self.pretrained.tokenizer)
        of_each = [each.rows(partial(self.encode, each.prompt)) for each in episodes]
        rows = [row for own in of_each for row in own]
        prompts = [(ids, len(list(same))) for ids, same in groupby(row.prompt_ids for row in rows)]  # neighbours share theirs
        repeats = torch.tensor([count for _, count in prompts], device=device)
        padded = pad_left([ids for ids, _ in prompts], pad, device)
        prompt_ids, prompt_mask = (part.repeat_interleave(repeats, dim=0) for part in padded)
        completion_ids, completion_mask = pad_right([row.ids for row in rows], pad, device)
        steps, sampled = None, completion_mask
        if any(row.steps for row in rows):
            steps = pad_values([row.steps for row in rows], 0, torch.long, device)
        if not all(all(row.sampled) for row in rows):
            sampled = pad_values([row.sampled for row in rows], False, torch.bool, device)
        logprobs = pad_values([row.logprobs for row in rows], 0.0, torch.float32, device)
        sequences = Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask, steps, sampled)
        completions = tuple(each.completion() for each in episodes)
        rollout = Rollout(tuple(request.prompts), completions, sequences, logprobs)
        if len(rows) == len(episodes):
            return rollout
        counts = torch.tensor([len(own) for own in of_each], device=device)
        return replace(rollout, episode_of_row=torch.arange(len(episodes), device=device).repeat_interleave(counts))


def _row_record(rollout: Rollout, row: int) -> dict[str, list[Any]]:
    sequences = rollout.sequences
    real = sequences.completion_mask[row]
    return {
        "prompt_ids": sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist(),
        "completion_ids": sequences.completion_ids[row][real].tolist(),
        "sampled": sequences.sampled_mask[row][real].tolist(),
        "logprobs": rollout.sampling_logprobs[row][real].tolist(),
    }


def _row_of(prompt: Prompt) -> dict[str, Any]:
    """What an agent gets of a prompt."""
    asked = prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages]
    return {**deepcopy(prompt.columns), "prompt": asked, "answer": prompt.answer}


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
    rewards, records = rollout.scored, list[dict[str, Any]]()
    for number, completion in enumerate(rollout.completions):
        place = divmod(number, rollout.group_size)
        episode, prompt = completion.episode, rollout.prompts[place[0]]
        assert episode is not None, "made by `LiveEpisode.completion`"
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
                **_row_record(rollout, rollout.first_row(number)),
                "columns": prompt.columns,
            }
        )
        if more := range(rollout.first_row(number) + 1, rollout.first_row(number + 1)):
            records[-1]["more_rows"] = [_row_record(rollout, other) for other in more]
    return records
