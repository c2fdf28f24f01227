"""`LiveEpisode`: one episode in progress, a coroutine. In each turn the policy samples a message, then the environment answers.

    prompt, messages of `start`  ->  sampled  ->  messages of `step`  ->  sampled  ->  ...

A completion without environment is an episode with one request. Its tokens are sampled and added ones; a mask marks the sampled.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from hybrid_lightning.environments import EpisodeLimits, Failure, RunningEpisodes, Step, TimedOut
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.interface import AskPolicy, MessageRequest, Sampled
from hybrid_lightning.types import Completion, Episode, Message, Prompt


class Writer(Protocol):
    """What writes and reads messages as tokens (see `Episodes`)."""

    pretrained: Pretrained

    @property
    def turns(self) -> TurnEncoder:
        """Encoder of the messages that environments add."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are skipped when a message is decoded."""

    @property
    def cut_mark(self) -> str:
        """What is written after a cut text."""


class EpisodeRow(NamedTuple):
    """A row of an episode as tokens."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]  # of the completion
    sampled: Sequence[bool]  # which of them the policy sampled
    logprobs: Sequence[float]  # 0 for others
    steps: Sequence[int]  # step of the weights that sampled last, per token; empty if all are the same


@dataclass(frozen=True)
class Rules:
    """What the episodes of a rollout share."""

    max_new_tokens: int  # of a message
    stop: Sequence[str]  # strings that end a message
    on_end: Callable[["LiveEpisode", Completion], None]  # called after the last turn, unless the environment failed
    environments: RunningEpisodes | None  # None: an episode is a single message
    writer: Writer
    episodes: list["LiveEpisode"] = field(default_factory=list)  # by number

    @property
    def limits(self) -> EpisodeLimits:
        """Limits of episodes with an environment."""
        assert self.environments is not None
        return self.environments.limits


@dataclass
class Group:
    """The episodes of a prompt, which begin with the same tokens."""

    prompt: Prompt
    seed: int = 0  # of the task
    ids: list[int] | None = None  # tokens before the first message; None until an episode has begun
    begun: tuple[Sequence[Message], tuple[list[int], list[Message]]] | None = None  # first messages, and what they render to

    def begin(self, turns: TurnEncoder, messages: Sequence[Message], name: str) -> list[Message]:
        """The conversation before the first turn of an episode, after these messages of its environment.

        Raises:
            RolloutError: If other episodes of the group began differently.
        """
        if self.begun is None or self.begun[0] != messages:
            self.begun = messages, turns.first(self.prompt, messages)
        ids, conversation = self.begun[1]
        self.ids = ids if self.ids is None else self.ids
        if ids != self.ids:
            raise RolloutError(
                f"{name} started episodes of {self.prompt.place} differently with the same seed, so their rewards cannot be "
                "compared; derive all randomness of the task from the seed, or set episodes.workers if it draws from global "
                "random generators"
            )
        return list(conversation)


@dataclass
class LiveEpisode:
    """An episode in progress (see `Playable`)."""

    number: int  # in its rollout
    group: Group
    rules: Rules
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # tokens of the completion
    sampled: list[bool] = field(default_factory=list)  # which of them the policy sampled
    logprobs: list[float] = field(default_factory=list)  # 0 for added tokens
    steps: list[int] = field(default_factory=list)  # step of the weights that sampled last, per token; empty if all are the same
    last: Sequence[int] = ()  # tokens of the policy's last message
    said: list[Completion] = field(default_factory=list)  # the policy's messages
    lengths: list[int] = field(default_factory=list)  # lengths of the policy's messages in tokens
    rewards: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    thinking: bool = False  # whether the prompt opens a thought
    opened: bool = False  # `thinking` before the last message
    end: str = ""  # empty while it runs
    has_begun: bool = False
    calling: str = ""  # kind of the call of its environment that is in progress

    async def play(self, ask: AskPolicy) -> None:
        """Play the episode to its end, from its current state."""
        environments = self.rules.environments
        if environments is not None and not self.has_begun:
            self.calling = "start"
            self._take(await environments.start(self.number, self.group.prompt, self.group.seed))
        while not self.end:
            assert self.group.ids is not None
            asked = MessageRequest(self.number, len(self.said), [*self.group.ids, *self.ids], self._room)
            self._add_message(await ask(asked))
            if environments is not None and not self.end:
                self.calling = "step"
                self._take(await environments.step(self.number, self._last_message()))
        if environments is not None and self.end != "failed":
            self.calling = "final reward"
            self._take(await environments.conclude(self.number))
        if self.end != "failed":
            self.rules.on_end(self, self.completion())

    def relocated(self) -> "LiveEpisode":
        """See `Playable`. A call that was in progress counts as one that took too long."""
        copied: dict[str, Any] = {name: value.copy() for name, value in vars(self).items() if isinstance(value, (list, Counter))}
        other = self.rules.episodes[self.number] = replace(self, **copied)  # the lost event loop may continue with this one
        if other.calling:
            assert self.rules.environments is not None
            other._take(self.rules.environments.lost(self.number, self.calling))
        return other

    @property
    def _room(self) -> int:
        """Most tokens of the next message."""
        if self.rules.environments is None:
            return self.rules.max_new_tokens
        return min(self.rules.max_new_tokens, self.rules.limits.max_tokens - len(self.ids))

    def _add_message(self, message: Sampled) -> None:
        """Add a message of the policy."""
        completion = message.completion
        if not self.said:
            self.thinking = completion.thinking
        self.last, self.opened = message.ids, completion.thinking
        self.lengths.append(len(message.ids))
        self.ids += message.ids
        self.logprobs += message.logprobs
        self.steps += message.steps
        self.sampled += [True] * len(message.ids)
        self.end = "tokens" if not completion.finished else "answered" if self.rules.environments is None else ""
        self.said.append(completion)
        self.messages.append({"role": "assistant", "content": str(completion)})

    def _last_message(self) -> Message:
        """The last message of the policy, for the environment (see `Environment.step`)."""
        rules = self.rules
        ids = self.last[:-1] if self.last and self.last[-1] in rules.writer.turns.stop_ids else self.last
        raw = str(self.said[-1])
        if not rules.writer.special_ids.isdisjoint(ids):  # without special tokens the text is the same, and decoding takes time
            raw = str(rules.writer.pretrained.tokenizer.decode(list(ids)))
            for stop in rules.stop:
                raw = raw.partition(stop)[0]
        return {**self.messages[-1], "raw": f"<think>{raw}" if self.opened else raw}

    def _take(self, answer: Any) -> None:
        """Add an answer of the environment: to `start`, to `step`, or at the end."""
        kind, self.calling = self.calling, ""
        if kind == "start":
            self.has_begun, environments = True, self.rules.environments
            begun, failed = ((), True) if isinstance(answer, Failure) else (answer, False)
            if failed:
                self.messages = list(self.rules.writer.turns.first(self.group.prompt)[1])
            else:
                assert environments is not None
                self.messages = self.group.begin(self.rules.writer.turns, begun, type(environments.environment).__name__)
        if isinstance(answer, Failure):
            self._fail()
        elif isinstance(answer, TimedOut):
            self.end = "time"
        elif isinstance(answer, Step):
            self._add_step(answer)
        elif kind == "final reward" and answer:
            self.rewards += [0.0] * (len(self.said) - len(self.rewards))
            self.rewards[-1] += answer

    def _add_step(self, answer: Step) -> None:
        self.rewards.append(answer.reward)
        self.counts.update(answer.counts)
        if answer.over or len(self.said) == self.rules.limits.max_turns:
            self.end = answer.end if answer.over else "turns"
            self.messages += answer.messages
            return
        messages, ids = self._fitted(answer.messages)
        self.messages += messages
        if len(self.ids) + len(ids) >= self.rules.limits.max_tokens:
            self.end = "tokens"
            return
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.steps += self.steps[-1:] * len(ids)
        self.sampled += [False] * len(ids)

    def _fitted(self, messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
        """Messages and their tokens; if configured, the last message is cut to leave room for a message of the policy."""
        limits, turns, prompt = self.rules.limits, self.rules.writer.turns, self.group.prompt
        ids = turns.added(prompt, messages, self.last)
        room = limits.max_tokens - len(self.ids) - self.rules.max_new_tokens
        if limits.too_long == "end" or len(ids) <= room or not messages:
            return list(messages), ids
        *before, last = messages
        text = str(last["content"])
        kept = len(text)
        while len(ids) > room and kept:
            # Cut by the excess tokens times the average length of a token, and by at least 8 characters.
            kept = max(0, min(kept - 8, kept * max(room, 0) // len(ids)))
            messages = [*before, {**last, "content": text[:kept] + self.rules.writer.cut_mark}]
            ids = turns.added(prompt, messages, self.last)
        self.counts["cut_answers"] += 1
        return list(messages), ids

    @property
    def prompt(self) -> Prompt:
        """The prompt of its group."""
        return self.group.prompt

    def rows(self, prompt_ids: Callable[[], Sequence[int]]) -> list[EpisodeRow]:
        """The episode as a row of tokens; `prompt_ids` gives its prompt if no episode of its group has begun."""
        return [EpisodeRow(self.group.ids or prompt_ids(), self.ids, self.sampled, self.logprobs, self.steps)]

    def _fail(self) -> None:
        """Leave the whole episode out of training."""
        self.end, self.ids, self.sampled, self.logprobs, self.steps, self.lengths = "failed", [], [], [], [], []

    def completion(self) -> Completion:
        """The policy's messages, for rewards and logs."""
        if self.rules.environments is None:
            return self.said[0]
        ended = self.end in ("answered", "over")
        rewards, lengths = tuple(self.rewards), tuple(self.lengths)
        episode = Episode(tuple(self.messages), len(self.said), self.end, rewards, dict(self.counts), lengths)
        return Completion("\n".join(self.said), sum(self.sampled), ended, self.thinking, episode)
