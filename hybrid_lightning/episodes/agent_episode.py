"""`AgentEpisode`: one episode in which an agent asks the policy for messages, in one or several conversations.

What the policy has sampled is never tokenized again. A request repeats a conversation from its beginning. If it begins with one
that the episode has, answers of the policy included, the sampled ids stand for these, and only what comes after is rendered and
appended. Else it is rendered as a whole and compared token by token: what differs from a row in a few tokens at its end continues
the row, with the difference as context; anything else begins another row (fork).
"""

import asyncio
import hashlib
import json
import logging
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from math import inf
from typing import Any, NamedTuple

from hybrid_lightning.agents.agent import Agent, AgentFaultError, result_of
from hybrid_lightning.agents.dialects import ChatAnswer, ChatRequest, RefusedError, ToolCall
from hybrid_lightning.agents.endpoint import Endpoint
from hybrid_lightning.environments import Call, CallFormat, EpisodeLimits, Failure
from hybrid_lightning.environments.answers import OddAnswerError
from hybrid_lightning.environments.running import Faults
from hybrid_lightning.environments.tagged_calls import choose_format, shows_tools
from hybrid_lightning.environments.tool import ToolSchema
from hybrid_lightning.environments.tool_environment import after_thought
from hybrid_lightning.episodes.episode import EpisodeRow
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, DataError, HybridLightningError, RolloutError
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.interface import AskPolicy, MessageRequest, Sampled
from hybrid_lightning.shared.user_calls import CallThreads, Outcome
from hybrid_lightning.shared.user_code import describe_error
from hybrid_lightning.types import Completion, Episode, Message, Prompt

logger = logging.getLogger(__name__)
_REFUSED = 16  # refused requests after which an agent is ended
_SHORT = 8  # tokens at the end of a row that a request may change
_ENCODERS = 64  # sets of tools whose encoders are kept
_LEAST_S = 0.05  # interval of looks at an agent's time


class Conversations:
    """Writes and reads the conversations of agents, by the policy's tokenizer and templates.

    Args:
        pretrained: The policy's.
        call_format: How the policy writes calls; None for the format of its template.
        turn_template: See `TurnEncoder`; None for the default.
        special_ids: Tokens that are skipped when a message is decoded.

    Raises:
        ConfigError: If the template teaches an unknown call format.
    """

    def __init__(
        self, pretrained: Pretrained, call_format: CallFormat | None, turn_template: str | None, special_ids: frozenset[int]
    ) -> None:
        template = pretrained.encoder.template_text
        self._pretrained, self._special_ids, self._template = pretrained, special_ids, turn_template
        self._given_format = call_format
        self.shows_tools = template is None or shows_tools(template)
        self.has_template = template is not None
        self.encoder = lru_cache(_ENCODERS)(self._encoder)  # by the tools, as JSON

    @property
    def call_format(self) -> CallFormat:
        """How the policy writes calls."""
        return self._given_format or choose_format(self._pretrained.encoder.template_text)

    def _encoder(self, tools: str) -> TurnEncoder:
        shown = json.loads(tools) if self.shows_tools else []
        return TurnEncoder(self._pretrained.encoder, self._pretrained.stop_ids, shown, self._template)

    @cached_property
    def longest(self) -> int:
        """Most characters of a token."""
        return max(len(token) for token in self._pretrained.tokenizer.get_vocab())

    def described(self, tools: Sequence[dict[str, Any]]) -> str:
        """A text that describes tools, where the template does not show them."""
        return self.call_format.describe(tools) if tools and not self.shows_tools else ""

    def raw(self, ids: Sequence[int], text: Completion, stops: Sequence[str], stop_ids: Sequence[int]) -> str:
        """A message with its special tokens, without the token or text that ended it, and without a leading thought."""
        ids, raw = ids[:-1] if ids and ids[-1] in stop_ids else ids, str(text)
        if not self._special_ids.isdisjoint(ids):
            raw = str(self._pretrained.tokenizer.decode(list(ids)))
            for stop in stops:
                raw = raw.partition(stop)[0]
        return after_thought(f"<think>{raw}" if text.thinking else raw)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [str(self._pretrained.tokenizer.decode([token])) for token in ids]


@dataclass(frozen=True)
class AgentRules:
    """What the episodes of a rollout share."""

    agent: Agent
    endpoint: Endpoint
    conversations: Conversations
    limits: EpisodeLimits
    faults: Faults
    max_new_tokens: int  # of a message
    context: float  # most tokens of a row
    stop: Sequence[str]  # strings that end every message
    needs_number: bool  # whether nothing but the agent gives a reward
    version: Callable[[Sampled], str]  # names the weights that sampled a message
    on_end: Callable[["AgentEpisode", Completion], None]
    warn: Callable[[str, str], None]
    threads: CallThreads


@dataclass(eq=False)
class _Row:
    """A conversation of the episode, as far as it is one row of tokens."""

    number: int
    name: str  # of its random numbers; "" for the main conversation
    tools: str  # as JSON
    encoder: TurnEncoder
    prompt: Prompt
    prompt_ids: list[int]
    history: list[Message] = field(default_factory=list)  # messages of its last request, and the answer
    shown: list[Message] = field(default_factory=list)  # the same for rewards and logs, with the policy's whole texts
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)  # after each answer: number of messages, of completion tokens
    turns: int = 0  # answers
    last: int = 0  # tokens of the last one
    is_busy: bool = False  # an answer is being sampled
    asked: int = 0  # number of its last request in the episode


class _Continuation(NamedTuple):
    """Where a request continues."""

    row: _Row
    kept: int  # tokens of its completion that stay
    context: list[int]  # tokens after them
    rewritten: bool = False  # whether the request's history was rewritten


@dataclass(eq=False)
class AgentEpisode:
    """An episode in progress (see `Playable`)."""

    number: int
    prompt: Prompt
    row: dict[str, Any]  # what the agent gets, without its address and key
    rules: AgentRules
    end: str = ""
    rewards: tuple[float, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    said: list[Completion] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    lines: list[_Row] = field(default_factory=list)
    _ask: AskPolicy | None = None
    _open: int = 0  # requests that wait for the policy
    _busy_s: float = 0.0  # time in which none did
    _since: float | None = None  # since when none does; None while one waits
    _requests: int = 0
    _refused: int = 0
    _limit: str = ""  # which limit has refused a request
    _was_cut: bool = False  # whether the last answer was cut
    _broken: asyncio.Future[None] | None = None  # its exception ends the agent
    _calls: dict[str, Message] = field(default_factory=dict)  # id of a call -> the policy's whole message
    _forks: int = 0

    # ---- playing

    async def play(self, ask: AskPolicy) -> None:
        """Let the agent solve its row."""
        self._ask, self._broken = ask, asyncio.get_running_loop().create_future()
        endpoint = self.rules.endpoint
        key = endpoint.open(self)
        try:
            value, error = await self._outcome(key)
        finally:
            endpoint.close(key)
            if not self._broken.cancel() and not self._broken.cancelled():
                self._broken.exception()  # asyncio warns of exceptions that nobody has seen
        self._finish(value, error)
        if self.end != "failed":
            self.rules.on_end(self, self.completion())

    def relocated(self) -> "AgentEpisode":
        """See `Playable`."""
        agent = self.rules.agent
        raise RolloutError(
            f"the agent {agent.name} has blocked the event loop for {agent.timeout_s:g} s, and with it all agents; `await` slow "
            "calls, or make the function an ordinary one, which runs in a thread"
        )

    async def _outcome(self, key: str) -> Outcome:
        """What the agent returned or raised, within its time."""
        agent, endpoint, broken = self.rules.agent, self.rules.endpoint, self._broken
        assert broken is not None
        await endpoint.start()
        row = {**self.row, "base_url": endpoint.base_url, "api_key": key}

        async def run() -> Outcome:
            try:
                return await agent.run(row, partial(endpoint.client, key), self.rules.threads), None
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                return None, AgentFaultError("was cancelled by itself")
            except BaseException as error:  # SystemExit would end the event loop
                return None, error

        self._since = time.monotonic()
        task = asyncio.create_task(run())
        try:
            while not task.done() and not broken.done():
                left = agent.timeout_s - self._used_s()
                if left <= 0:
                    return None, TimeoutError()
                await asyncio.wait((task, broken), timeout=max(left, _LEAST_S), return_when=asyncio.FIRST_COMPLETED)
            return (None, broken.exception()) if broken.done() else task.result()
        finally:
            task.cancel()
            if not task.done():
                await asyncio.wait((task,), timeout=_LEAST_S if agent.is_threaded else 1.0)

    def _used_s(self) -> float:
        return self._busy_s + (0.0 if self._since is None else time.monotonic() - self._since)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        """Take what the agent returned or raised as the end of the episode."""
        agent, limits = self.rules.agent, self._limit
        if isinstance(error, HybridLightningError):
            raise error
        failure: Failure | None = None
        where = f"{agent.name}: the agent for {self.prompt.place}"
        if isinstance(error, TimeoutError) and not str(error) and self._used_s() >= agent.timeout_s:
            failure = Failure(f"{where} took longer than agent.timeout_s={agent.timeout_s:g} s", late=True)
        elif isinstance(error, AgentFaultError) and (not limits or self._refused > _REFUSED):
            failure = Failure(f"{where}: {error}")
        elif error is not None and (not limits or self._refused > _REFUSED):
            failure = Failure(f"{where} raised {describe_error(error)}")
        elif not self.said:
            asking = "ask by the client, or at row['base_url'] with row['api_key']"
            failure = Failure(f"{where} got no message of the policy; {asking}")
        else:
            try:
                # An agent that ended at a limit of the episode has not solved its row.
                result = result_of(value if error is None else {"reward": 0.0}, self.rules.needs_number)
            except OddAnswerError as odd:
                failure = Failure(f"{where} {odd}")
        if failure is not None:
            self._fail(failure)
        else:
            self.rewards = (*[0.0] * (len(self.said) - 1), result.reward or 0.0)
            self.counts.update({f"parts/{name}": part for name, part in result.parts.items()})
            if result.reward is not None and error is None and not self.rules.needs_number:
                uncounted = f"the agent {agent.name} returns a reward, and model.reward does not count it"
                self.rules.warn("uncounted", f"{uncounted}; add EpisodeReturn to model.reward, or return None")
            self.end = limits or ("tokens" if self._was_cut else "answered")
            trained = sum(sum(row.sampled) for row in self.lines)
            self.counts.update(rows=len(self.lines), forks=self._forks)
            self.counts["trained_share"] = trained / max(1, sum(self.lengths))  # type: ignore[assignment]
        self.rules.faults.note("reward", failure)

    def _fail(self, failure: Failure) -> None:
        self.end, self.lines, self.lengths = "failed", [], []
        self.rules.warn("failed", f"{failure.reason}; the episode is left out, and further such faults are counted alone")

    # ---- requests

    async def complete(self, asked: ChatRequest) -> ChatAnswer:
        """The policy's next message (see `Conversing`)."""
        self._requests += 1
        try:
            place, limit = self._checked(asked)
        except RefusedError:
            self._refused += 1
            if self._refused > _REFUSED and self._broken is not None and not self._broken.done():
                self._broken.set_exception(AgentFaultError(f"goes on after {_REFUSED} requests were refused"))
            raise
        row, number = place.row, self._requests
        before = [*row.prompt_ids, *row.ids[: place.kept], *place.context]
        named: int | str = f"{row.name} {row.turns}" if row.name else row.turns
        request = MessageRequest(self.number, named, before, limit, row.number, asked.stop, limit)
        row.is_busy = True
        self._wait(1)
        try:
            assert self._ask is not None
            message = await self._ask(request)
        except BaseException as error:
            if not row.ends:
                self.lines.remove(row)
            if not isinstance(error, HybridLightningError):
                raise
            if self._broken is not None and not self._broken.done():
                self._broken.set_exception(error)
            raise RefusedError(f"the policy cannot be sampled: {error}", 503) from error
        finally:
            self._wait(-1)
            row.is_busy = False
        return self._take(asked, place, message, number)

    def _wait(self, change: int) -> None:
        """Stop the agent's clock while a request waits for the policy."""
        self._open += change
        if self._open and self._since is not None:
            self._busy_s, self._since = self._used_s(), None
        elif not self._open:
            self._since = time.monotonic()

    def _checked(self, asked: ChatRequest) -> tuple[_Continuation, int]:
        """Where a request continues, and the most tokens of its message; RefusedError if there is no room."""
        rules, limits = self.rules, self.rules.limits
        if not asked.messages:
            raise RefusedError("messages is empty; give at least one message")
        if len(self.said) + self._open >= limits.max_turns:
            self._limit = self._limit or "turns"
            had = f"the episode has had its {limits.max_turns} messages (model.episodes.max_turns)"
            raise RefusedError(had, 400, "episode_turns")
        most = rules.context * rules.conversations.longest
        if sum(len(message["content"]) for message in asked.messages) > most:  # tokenizing it would take long
            self._limit = self._limit or "tokens"
            too_long = f"the conversation is longer than {rules.context:g} tokens, which is what the policy takes"
            raise RefusedError(too_long, 400, "context_length_exceeded")
        try:
            place = self._place(asked)
        except (ConfigError, DataError) as error:
            raise RefusedError(str(error)) from error
        used = place.kept + len(place.context)
        row = place.row
        room = min(limits.max_tokens - used, rules.context - len(row.prompt_ids) - used)
        if room < 1:
            if not row.ends:
                self.lines.remove(row)
            self._limit = self._limit or "tokens"
            raise RefusedError(
                f"the conversation has {len(row.prompt_ids) + used} tokens, which leaves no room for a message: the policy takes "
                f"{rules.context:g}, and model.episodes.max_tokens={limits.max_tokens} after the first request",
                400,
                "context_length_exceeded",
            )
        return place, int(min(room, rules.max_new_tokens, asked.max_tokens or inf))

    def _place(self, asked: ChatRequest) -> _Continuation:
        messages, tools = asked.messages, json.dumps(asked.tools)
        found: tuple[int, int, _Row] | None = None  # messages and tokens that it shares with a row, up to an answer
        for row in self.lines:
            for count, tokens in reversed(row.ends) if row.tools == tools else ():
                if found is not None and found[0] >= count:
                    break
                if count < len(messages) and _same_messages(row.history[:count], messages[:count]):
                    found = count, tokens, row
                    break
        rewritten = any(message["role"] == "assistant" for message in messages)
        if found is not None:
            count, tokens, row = found
            if all(message["role"] != "assistant" for message in messages[count:]):
                try:
                    sampled = row.ids[:tokens]
                    context = row.encoder.added(row.prompt, self._written(messages, count), sampled[-1:])
                except ConfigError:
                    pass  # a template that writes earlier turns in another way when messages follow
                else:
                    if tokens == len(row.ids) and not row.is_busy:
                        return _Continuation(row, tokens, context)
                    begin = [*row.prompt_ids, *sampled, *context]
                    return _Continuation(self._new(asked, tools, row.encoder, row.prompt, begin), 0, [], True)
        encoder = self.rules.conversations.encoder(tools)
        ids, prompt = encoder.whole(self._written(messages), self.rules.conversations.described(asked.tools))
        if rewritten:
            for row in reversed(self.lines):
                if row.tools == tools and row.ends and not row.is_busy and (place := _continued(row, ids)) is not None:
                    return place
        return _Continuation(self._new(asked, tools, encoder, prompt, ids), 0, [], rewritten)

    def _new(self, asked: ChatRequest, tools: str, encoder: TurnEncoder, prompt: Prompt, ids: list[int]) -> _Row:
        name = ""
        if self.lines:
            digest = hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest()
            name = f"{digest} {sum(row.name.startswith(digest) for row in self.lines)}"
        row = _Row(max((row.number for row in self.lines), default=-1) + 1, name, tools, encoder, prompt, ids)
        self.lines.append(row)
        return row

    def _written(self, messages: Sequence[Message], start: int = 0) -> list[Message]:
        """Messages from a number on, as the template gets them."""
        shows, written = self.rules.conversations.shows_tools, list[Message]()
        names = {call.id: call.name for message in messages for call in message.get("calls", ())}
        for message in messages[start:]:
            shown: dict[str, Any] = {"role": message["role"], "content": message["content"]}
            if message["role"] == "tool":
                name = message.get("name") or names.get(message.get("tool_call_id"))
                shown |= {"name": name} if name else {}
                shown["role"] = "tool" if shows else "user"
            elif message.get("calls"):
                if not shows or not self.rules.conversations.has_template:
                    shown = dict(self._whole(message))
                else:
                    shown["tool_calls"] = [_for_template(call) for call in message["calls"]]
            written.append(shown)
        return written

    def _whole(self, message: Message) -> Message:
        """A message of the policy with its whole text, calls included."""
        calls = message.get("calls", ())
        known = next((self._calls[call.id] for call in calls if call.id in self._calls), None)
        if known is not None:
            return known
        texts = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in calls]
        return {"role": message["role"], "content": "\n".join(filter(None, [message["content"], *texts]))}

    def _take(self, asked: ChatRequest, place: _Continuation, message: Sampled, number: int) -> ChatAnswer:
        """Add a message of the policy to its row, and make the answer."""
        rules, row, completion = self.rules, place.row, message.completion
        self._forks += place.rewritten and not row.ends
        had = row.ends[-1][0] if row.ends and not place.rewritten else 0
        context = len(place.context)
        last_step = row.steps[place.kept - 1 : place.kept] or message.steps[:1]
        for values, of_context, new in (
            (row.ids, place.context, message.ids),
            (row.sampled, [False] * context, [True] * len(message.ids)),
            (row.logprobs, [0.0] * context, message.logprobs),
            (row.steps, last_step * context, message.steps),
        ):
            values[place.kept :] = [*of_context, *new]  # type: ignore[operator]
        row.turns, row.last, row.asked = row.turns + 1, len(message.ids), number
        raw = rules.conversations.raw(message.ids, completion, (*rules.stop, *asked.stop), row.encoder.stop_ids)
        calls = self._read_calls(asked, raw)
        whole: Message = {"role": "assistant", "content": str(completion)}
        self._calls |= {call.id: whole for call in calls}
        answer: dict[str, Any] = {"role": "assistant", "content": "" if calls else str(completion)}
        answer |= {"calls": calls} if calls else {}
        row.shown = [*row.shown[:had], *(self._shown(each) for each in asked.messages[had:]), whole]
        row.history = [*asked.messages, answer]
        row.ends = [*(row.ends if had else ()), (len(row.history), len(row.ids))]
        self.said.append(completion)
        self.lengths.append(len(message.ids))
        self._was_cut = not completion.finished
        texts = rules.conversations.pieces(message.ids) if asked.logprobs else [""] * len(message.ids)
        pairs = list(zip(texts, message.logprobs, strict=True))
        prompt_tokens = len(row.prompt_ids) + len(row.ids) - len(message.ids)
        named = f"{self.number}-{row.number}-{row.turns}"
        return ChatAnswer(named, str(completion), calls, not completion.finished, prompt_tokens, pairs, rules.version(message))

    def _shown(self, message: Message) -> Message:
        if message["role"] == "assistant":
            return self._whole(message)
        return {key: value for key, value in message.items() if key != "calls"}

    def _read_calls(self, asked: ChatRequest, text: str) -> list[ToolCall]:
        """The calls in a message, each with an id."""
        if not asked.tools or not asked.calls:
            return []
        schemas, found = {tool["function"]["name"]: ToolSchema(tool) for tool in asked.tools}, list[ToolCall]()
        for call in self.rules.conversations.call_format.parse(text, asked.tools):
            if not isinstance(call, Call):
                self.counts["malformed_calls"] += 1
                continue
            name, arguments, wrong = call.name or next(iter(schemas)), dict(call.arguments), ""
            if call.text is not None:
                if name in schemas:
                    arguments, wrong = schemas[name].arguments(call)
                else:
                    wrong = "unknown"
            if wrong:
                self.counts["malformed_calls"] += 1
                continue
            self.counts["calls"] += 1
            letters = random.Random(f"{self.number} {len(self._calls)} {len(found)} {len(self.said)}")
            id = "".join(letters.choices(string.ascii_letters + string.digits, k=9))
            found.append(ToolCall(id, name, json.dumps(arguments, ensure_ascii=False)))
        return found

    # ---- the end

    def rows(self, prompt_ids: Callable[[], Sequence[int]]) -> list[EpisodeRow]:
        """The rows of the episode; one without a completion if it failed, after these tokens."""
        rows = [EpisodeRow(row.prompt_ids, row.ids, row.sampled, row.logprobs, row.steps) for row in self.lines if row.ends]
        return rows or [EpisodeRow(prompt_ids(), [], [], [], [])]

    def completion(self) -> Completion:
        """The policy's messages, for rewards and logs."""
        messages = [message for row in sorted(self.lines, key=lambda row: row.asked) for message in row.shown]
        ended, sampled = self.end == "answered", sum(sum(row.sampled) for row in self.lines)
        asked = self.prompt.messages or ({"role": "user", "content": self.prompt.text or ""},)
        counts, lengths = dict(self.counts), tuple(self.lengths)
        episode = Episode(tuple(messages or asked), len(self.said), self.end, self.rewards, counts, lengths)
        thinking = self.said[0].thinking if self.said else False
        return Completion("\n".join(self.said), sampled, ended, thinking, episode)


def _continued(row: _Row, ids: list[int]) -> _Continuation | None:
    """A row that these tokens continue, apart from a short difference at its end; None if they do not."""
    full, begin = [*row.prompt_ids, *row.ids], len(row.prompt_ids)
    pairs = enumerate(zip(full, ids, strict=False))
    common = next((place for place, (one, other) in pairs if one != other), min(len(full), len(ids)))
    missing = len(full) - common
    if common < begin or len(ids) <= common or missing > _SHORT or 2 * missing >= row.last:
        return None
    return _Continuation(row, common - begin, ids[common:], True)


def _same_messages(some: Sequence[Message], others: Sequence[Message]) -> bool:
    return all(_same(one, other) for one, other in zip(some, others, strict=True))


def _same(one: Message, other: Message) -> bool:
    """Whether a message has come back as it was sent: by the ids of its calls, or by equal content and calls."""
    if one is other:
        return True
    if one["role"] != other["role"]:
        return False
    if one.get("calls") and other.get("calls"):
        ids = [call.id for call in one["calls"]]
        return ids == [call.id for call in other["calls"]]
    return all(one.get(key) == other.get(key) for key in ("content", "calls", "tool_call_id"))


def _for_template(call: ToolCall) -> dict[str, Any]:
    """A call as chat templates of transformers take it."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}
