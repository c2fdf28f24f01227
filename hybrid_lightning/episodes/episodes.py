"""`Episodes`: plays episodes turn by turn. In each turn the policy samples a message, then all environments answer.

    prompt, messages of `start`  ->  sampled  ->  messages of `step`  ->  sampled  ->  ...

An episode is one row of a rollout. Its completion holds sampled and added tokens as token ids; a mask marks the sampled ones. All
running episodes are in the same turn, so they are sampled in one batch.

Axes: P prompts, G episodes of each, B = P * G episodes in prompt-major order, T completion tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hybrid_lightning.environments import CUT_MARK, Environment, EpisodeLimits, Failure, RunningEpisodes, Step, TimedOut
from hybrid_lightning.episodes.turns import TurnEncoder
from hybrid_lightning.errors import ConfigError, RolloutError, shorten
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.rollout.batching import pad_left, pad_right, pad_token
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.rollout.rollout_engine import RolloutEngine
from hybrid_lightning.sharding.ranks import gather_objects
from hybrid_lightning.types import Completion, Episode, Message, Prompt, Rewards, Rollouts, Sequences
from hybrid_lightning.user_code import in_user_code

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # PEFT is slow to import

ENDS = ("answered", "over", "turns", "tokens", "time", "failed")  # see `Episode.end`


@dataclass
class _Row:
    """An episode in progress."""

    prompt: Prompt
    messages: list[Message]
    ids: list[int] = field(default_factory=list)  # tokens of the completion
    sampled: list[bool] = field(default_factory=list)  # which of them the policy sampled
    logprobs: list[float] = field(default_factory=list)  # 0 for added tokens
    steps: list[int] = field(default_factory=list)  # step of the weights that sampled last, per token; empty if all are the same
    last: Sequence[int] = ()  # tokens of the policy's last message
    texts: list[str] = field(default_factory=list)  # texts of the policy's messages
    lengths: list[int] = field(default_factory=list)  # lengths of the policy's messages in tokens
    rewards: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    thinking: bool = False  # whether the prompt opens a thought
    opened: bool = False  # `thinking` before the last message
    end: str = ""  # empty while it runs

    def add_turn(self, ids: Sequence[int], logprobs: Sequence[float], steps: Sequence[int], completion: Completion) -> None:
        """Add a message of the policy."""
        if not self.texts:
            self.thinking = completion.thinking
        self.last, self.opened = ids, completion.thinking
        self.lengths.append(len(ids))
        self.ids += ids
        self.logprobs += logprobs
        self.steps += steps
        self.sampled += [True] * len(ids)
        self.end = "" if completion.finished else "tokens"
        self.texts.append(str(completion))
        self.messages.append({"role": "assistant", "content": str(completion)})

    def add_reply(self, ids: Sequence[int]) -> None:
        """Add tokens that the policy reads."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.steps += self.steps[-1:] * len(ids)
        self.sampled += [False] * len(ids)

    def earn(self, reward: float) -> None:
        """Add the final reward, as a reward of the last turn."""
        if reward:
            self.rewards += [0.0] * (len(self.texts) - len(self.rewards))
            self.rewards[-1] += reward

    def fail(self) -> None:
        """Leave the whole episode out of training."""
        self.end, self.ids, self.sampled, self.logprobs, self.steps, self.lengths = "failed", [], [], [], [], []

    def completion(self) -> Completion:
        """The policy's messages, for rewards and logs."""
        rewards, lengths = tuple(self.rewards), tuple(self.lengths)
        episode = Episode(tuple(self.messages), len(self.texts), self.end, rewards, dict(self.counts), lengths)
        ended = self.end in ("answered", "over")
        return Completion("\n".join(self.texts), sum(self.sampled), ended, self.thinking, episode)


class Episodes:
    """Plays the episodes of a policy.

    `environment` is the object in the config; each episode gets its own. For `on_wait` and `turn_rewards` see `RunningEpisodes`.
    """

    def __init__(
        self,
        environment: Environment,
        limits: EpisodeLimits,
        sampler: RolloutEngine,
        pretrained: Pretrained,
        turn_template: str | None,
        turn_rewards: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.environment, self.limits, self.sampler, self.pretrained = environment, limits, sampler, pretrained
        self._turn_template, self._turn_rewards = turn_template, turn_rewards
        self._running = RunningEpisodes(environment, limits, on_wait, turn_rewards)

    @classmethod
    def of(
        cls,
        environment: Environment | None,
        limits: EpisodeLimits | None,
        sampler: RolloutEngine,
        pretrained: Pretrained,
        turn_template: str | None,
        turn_rewards: bool = False,
    ) -> Self | None:
        """The episodes for a policy's options, or None without an environment; ConfigError for other options without one."""
        if environment is not None:
            return cls(environment, limits or EpisodeLimits(), sampler, pretrained, turn_template, turn_rewards)
        for name, value in (("episodes", limits), ("turn_template", turn_template)):
            if value is not None:
                raise ConfigError(f"model.{name} needs model.environment, which is not set; set it, or remove model.{name}")
        return None

    @cached_property
    def turns(self) -> TurnEncoder:
        """Encoder of the messages that environments add."""
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
        with in_user_code(self.environment, "tools_of"):
            return self.environment.tools_of(prompt)

    @cached_property
    def _special(self) -> set[int]:
        """Tokens that are skipped when a message is decoded."""
        tokenizer = self.pretrained.tokenizer
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        return added.union(tokenizer.all_special_ids)

    def clone_for_thread(self, on_wait: Callable[[], None]) -> "Episodes":
        """A copy for another thread, with its own tokenizer and its own processes for environments."""
        options = self.pretrained.clone_for_thread(), self._turn_template, self._turn_rewards, on_wait
        other = Episodes(self.environment, self.limits, self.sampler, *options)
        _ = other.turns  # reads the tokenizer here, not in that thread
        return other

    def shut_down(self) -> None:
        """End the processes of environments; they start again when needed."""
        self._running.close()

    def play(self, engine: "Engine", request: SamplingRequest, seeds: Sequence[int]) -> Rollouts:
        """Play G episodes of each prompt.

        Args:
            engine: See `RolloutEngine.sample`.
            request: Prompts without token ids, since the ids depend on the environment's first messages.
            seeds: A seed for the task of each prompt.

        Raises:
            RolloutError: If the engine fails, too many environments fail, or the episodes of a group begin differently.
        """
        prompts, samples, running = request.prompts, request.samples_per_prompt, self._running
        try:
            every = [prompt for prompt in prompts for _ in range(samples)]
            started = running.start(every, [seed for seed in seeds for _ in range(samples)])
            rows, ids = self._begin(prompts, started, samples)
            # Of an episode that failed before its first turn, only one token is sampled.
            limits = [1 if row.end else self.sampler.max_new_tokens for row in rows]
            asked = replace(request, prompt_ids=ids, limits=limits, on_completion=None)
            conversation = self.sampler.conversation(engine, self.pretrained.tokenizer, asked, self.limits.max_tokens)
            sampled, numbers = conversation.first(), list(range(len(rows)))
            while True:
                self._add_turns(rows, numbers, sampled)
                continuing = [number for number in numbers if not rows[number].end]
                answers = running.step({number: self._message(rows[number]) for number in continuing})
                added = {number: self._add_reply(rows[number], answers[number]) for number in continuing}
                ended = [number for number in numbers if rows[number].end not in ("", "failed")]
                for number, earned in running.conclude(ended).items():
                    if isinstance(earned, Failure):
                        rows[number].fail()
                    else:
                        rows[number].earn(earned)
                numbers = [number for number in continuing if not rows[number].end]
                if not numbers:
                    break
                if request.on_completion is not None:
                    for number in ended:
                        if rows[number].end != "failed":
                            request.on_completion(number, rows[number].completion())
                sampled = conversation.next(numbers, [added[number] for number in numbers])
        finally:
            running.finish()
        return self._rollouts(prompts, rows, ids, samples, next(engine.model.parameters()).device)

    def _begin(
        self, prompts: Sequence[Prompt], started: Sequence[Sequence[Message] | Failure], samples: int
    ) -> tuple[list[_Row], list[list[int]]]:
        """The rows of episodes before the first turn, and the first tokens of each group."""
        rows: list[_Row] = []
        begins: list[list[int]] = []
        for number, prompt in enumerate(prompts):
            firsts: list[list[int]] = []  # first tokens of the episodes that did not fail
            rendered: Sequence[Message] | None = None
            for messages in started[number * samples : (number + 1) * samples]:
                begun = () if isinstance(messages, Failure) else messages
                if rendered is None or begun != rendered:
                    (ids, conversation), rendered = self.turns.first(prompt, begun), begun
                rows.append(_Row(prompt, list(conversation), end="failed" if isinstance(messages, Failure) else ""))
                firsts += [] if rows[-1].end else [ids]
            if any(other != firsts[0] for other in firsts):
                raise RolloutError(
                    f"{type(self.environment).__name__} started episodes of {prompt.place} differently with the same seed, so "
                    "their rewards cannot be compared; derive all randomness of the task from the seed, or set episodes.workers "
                    "if it draws from global random generators"
                )
            begins.append(firsts[0] if firsts else ids)
        return rows, begins

    def _add_turns(self, rows: Sequence[_Row], numbers: Sequence[int], sampled: Rollouts) -> None:
        """Add messages of the policy to the running episodes."""
        sequences = sampled.sequences
        made_by = [[] for _ in numbers] if sequences.weights_step is None else sequences.weights_step.tolist()
        columns = (sequences.completion_ids.tolist(), sampled.sampling_logprobs.tolist(), made_by)
        lengths = sequences.completion_mask.sum(dim=1).tolist()
        for number, length, tokens, logprobs, steps, message in zip(numbers, lengths, *columns, sampled.completions, strict=True):
            if not rows[number].end:
                rows[number].add_turn(tokens[:length], logprobs[:length], steps[:length], message)

    def _message(self, row: _Row) -> Message:
        """The last message of the policy, for the environment (see `Environment.step`)."""
        ids = row.last[:-1] if row.last and row.last[-1] in self.turns.stop_ids else row.last
        raw = row.texts[-1]
        if not self._special.isdisjoint(ids):  # without special tokens the text is the same, and decoding takes time
            raw = str(self.pretrained.tokenizer.decode(list(ids)))
            for stop in self.sampler.stop:
                raw = raw.partition(stop)[0]
        return {**row.messages[-1], "raw": f"<think>{raw}" if row.opened else raw}

    def _add_reply(self, row: _Row, answer: Step | Failure | TimedOut) -> list[int]:
        """Add an environment's answer to an episode; returns the tokens that the policy reads, none if the episode is over."""
        if isinstance(answer, Failure):
            row.fail()
            return []
        if isinstance(answer, TimedOut):
            row.end = "time"
            return []
        row.rewards.append(answer.reward)
        row.counts.update(answer.counts)
        if answer.over or len(row.texts) == self.limits.max_turns:
            row.end = answer.end if answer.over else "turns"
            row.messages += answer.messages
            return []
        messages, ids = self._fitted(row, answer.messages)
        row.messages += messages
        if len(row.ids) + len(ids) >= self.limits.max_tokens:
            row.end = "tokens"
            return []
        row.add_reply(ids)
        return ids

    def _fitted(self, row: _Row, messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
        """Messages and their tokens; if configured, the last message is cut to leave room for a message of the policy."""
        ids = self.turns.added(row.prompt, messages, row.last)
        room = self.limits.max_tokens - len(row.ids) - self.sampler.max_new_tokens
        if self.limits.too_long == "end" or len(ids) <= room or not messages:
            return list(messages), ids
        *before, last = messages
        text = str(last["content"])
        kept = len(text)
        while len(ids) > room and kept:
            # Cut by the excess tokens times the average length of a token, and by at least 8 characters.
            kept = max(0, min(kept - 8, kept * max(room, 0) // len(ids)))
            messages = [*before, {**last, "content": text[:kept] + CUT_MARK}]
            ids = self.turns.added(row.prompt, messages, row.last)
        row.counts["cut_answers"] += 1
        return list(messages), ids

    def _rollouts(
        self, prompts: Sequence[Prompt], rows: Sequence[_Row], ids: Sequence[list[int]], samples: int, device: torch.device
    ) -> Rollouts:
        def padded(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return pad_sequence([torch.tensor(row, dtype=dtype) for row in values], batch_first=True).to(device)

        pad = pad_token(self.pretrained.tokenizer)
        prompt_ids, prompt_mask = (part.repeat_interleave(samples, dim=0) for part in pad_left(ids, pad, device))
        completion_ids, completion_mask = pad_right([row.ids for row in rows], pad, device)
        steps = padded([row.steps for row in rows], torch.long) if any(row.steps for row in rows) else None
        sampled = padded([row.sampled for row in rows], torch.bool)
        sequences = Sequences(prompt_ids, prompt_mask, completion_ids, completion_mask, steps, sampled)
        completions = tuple(row.completion() for row in rows)
        return Rollouts(
            tuple(prompts),
            sequences,
            completions,
            padded([row.logprobs for row in rows], torch.float32),
            torch.tensor([completion.finished for completion in completions], device=device),
            samples,
        )


def token_advantages(advantages: Tensor, rollouts: Rollouts) -> Tensor:
    """Give each sampled token of B episodes the advantage of its turn.

    Args:
        advantages: [K * B], one row of B per turn, from the first turn on (see `rewards_to_go`).
        rollouts: B episodes.

    Returns:
        [B, T], 0 for tokens that were not sampled; if K = 1, the unchanged advantages of the sequences, [B].
    """
    sampled = rollouts.sequences.sampled_mask
    turns = len(advantages) // max(1, len(sampled))
    if turns == 1:
        return advantages
    lengths = torch.zeros(len(sampled), turns, dtype=torch.long)
    for row, completion in enumerate(rollouts.completions):
        assert completion.episode is not None, "made by `play`"
        own = completion.episode.lengths
        lengths[row, : len(own)] = torch.tensor(own)
    result = advantages.new_zeros(sampled.shape)
    result[sampled] = advantages.view(turns, -1).T.flatten().repeat_interleave(lengths.flatten().to(sampled.device))
    return result


def begun_with(rollouts: Rollouts, number: int) -> list[Message]:
    """The messages that the environment added to a prompt before the first turn; empty without episodes."""
    samples, prompt = rollouts.samples_per_prompt, rollouts.prompts[number]
    asked = list(prompt.messages or [{"role": "user", "content": prompt.text}])
    for completion in rollouts.completions[number * samples : (number + 1) * samples]:
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


def episode_records(rollouts: Rollouts, rewards: Rewards, greedy: bool = False) -> list[dict[str, Any]]:
    """One record per episode, ready for JSON; in greedy records, one per prompt, `sample` is None."""
    sequences, records = rollouts.sequences, []
    for row, completion in enumerate(rollouts.completions):
        episode, prompt = completion.episode, rollouts.prompts[row // rollouts.samples_per_prompt]
        assert episode is not None, "made by `play`"
        real = sequences.completion_mask[row]
        records.append(
            {
                "set": prompt.set_name,
                "index": prompt.index,
                "sample": None if greedy else row % rollouts.samples_per_prompt,
                "answer": prompt.answer,
                "messages": [dict(message) for message in episode.messages],
                "end": episode.end,
                "turn_rewards": list(episode.rewards),
                "counts": dict(episode.counts),
                "reward": float(rewards.total[row]),
                "reward_parts": {name: float(part[row]) for name, part in rewards.parts.items()},
                "correct": rewards.right(row),
                "prompt_ids": sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist(),
                "completion_ids": sequences.completion_ids[row][real].tolist(),
                "sampled": sequences.sampled_mask[row][real].tolist(),
                "logprobs": rollouts.sampling_logprobs[row][real].tolist(),
                "columns": prompt.columns,
            }
        )
    return records
