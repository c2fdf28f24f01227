"""`RunningEpisodes`: runs the environments of a rollout concurrently, with their limits and faults."""

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any, Literal

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.environments.objects import Objects, random_states, restore_random_states, same_random_states
from hybrid_lightning.environments.running_episode import Failure, RunningEpisode, Started, TimedOut
from hybrid_lightning.environments.workers import Worker, workers_for
from hybrid_lightning.errors import ConfigError, EpisodeError
from hybrid_lightning.types import Message, Prompt
from hybrid_lightning.user_calls import LoopLostError, run_async

logger = logging.getLogger(__name__)
_BLOCKED_S = 2.0  # how long a busy machine may keep the event loop from running
_HOPELESS = 8  # if the first answers of a rollout are all late, the others will be late, too
_Answer = Started | Step | TimedOut | float


class EpisodeLimits(Configurable):
    """Limits of episodes.

    Args:
        max_turns: Most messages of the policy in an episode; the episode then ends with the reason "turns".
        max_tokens: Most tokens of an episode after its prompt, sampled or added; the episode then ends with the reason "tokens".
        step_timeout_s: Longest time of each call of an environment in seconds. A step that takes longer ends its episode with the
            reason "time". If this happens to the first eight steps of a rollout, the run stops.
        too_long: What happens if an answer of the environment does not fit into `max_tokens`: "cut" truncates it, with a mark
            if the tokenizer can write it; "end" leaves it out and ends the episode with the reason "tokens".
        max_failed_share: Share of a rollout's episodes that may be left out because their environment failed. The run stops if
            more fail.
        workers: Number of processes for environments. Each process runs one environment at a time. Use them for environments that
            draw from global random generators, change other global state, need much processor time or may hang. 0 runs
            environments in this process. Each rollout in progress (`rollouts_ahead`) has its own processes.

    Raises:
        ConfigError: If a value is invalid.
    """

    def __init__(
        self,
        max_turns: int = 8,
        max_tokens: int = 1024,
        step_timeout_s: float = 60.0,
        too_long: Literal["cut", "end"] = "cut",
        max_failed_share: float = 0.1,
        workers: int = 0,
    ) -> None:
        for name, value, least in (("max_turns", max_turns, 1), ("max_tokens", max_tokens, 1), ("workers", workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"episodes.{name}={value!r}; give a whole number of at least {least}")
        if isinstance(step_timeout_s, bool) or not 0 < step_timeout_s < float("inf"):
            raise ConfigError(f"episodes.step_timeout_s={step_timeout_s!r}; give a positive number of seconds")
        if too_long not in ("cut", "end"):
            raise ConfigError(f"episodes.too_long={too_long!r}; give cut or end")
        if isinstance(max_failed_share, bool) or not 0 <= max_failed_share <= 1:
            raise ConfigError(f"episodes.max_failed_share={max_failed_share!r}; give a share from 0 to 1")
        self.max_turns, self.max_tokens, self.step_timeout_s = max_turns, max_tokens, step_timeout_s
        self.too_long, self.max_failed_share, self.workers = too_long, max_failed_share, workers


class RunningEpisodes:
    """The environments of the episodes of a rollout.

    Each episode has its own object. Episodes are independent: one episode's actions and timing do not affect another. An
    environment that fails (it raises, or returns a malformed answer) is started again with the same seed, at most twice, and the
    policy's messages are replayed.

    In this process `async` methods are awaited together, and ordinary methods run in threads, one per episode (see
    `Environment.thread_safe`). The states of the global random generators and the working folder are restored afterwards, but the
    episodes share them: draws from global generators are repeatable only with `limits.workers`.

    Args:
        environment: The object of the config, prepared for the model.
        limits: Limits of the episodes.
        on_wait: Called from time to time while waiting for environments; an exception from it ends the wait.
        turn_rewards: Whether the reward of each turn counts by itself (see `Environment.turn_rewards`).

    Example:
        >>> class Echo(Environment):
        ...     def step(self, message):
        ...         return f"You said {message['content']}", 1.0, message["content"] == "bye"
        >>> episodes = RunningEpisodes(Echo(), EpisodeLimits())
        >>> episodes.start([Prompt(text="Hello"), Prompt(text="Hello")], seeds=[5, 5])
        [(), ()]
        >>> answers = episodes.step({1: {"role": "assistant", "content": "bye"}})
        >>> answers[1].messages, answers[1].over
        (({'role': 'user', 'content': 'You said bye'},), True)
        >>> episodes.conclude([1])
        {1: 0.0}
        >>> episodes.close()
    """

    def __init__(
        self,
        environment: Environment,
        limits: EpisodeLimits,
        on_wait: Callable[[], None] = lambda: None,
        turn_rewards: bool = False,
    ) -> None:
        self.environment, self.limits, self._on_wait = environment, limits, on_wait
        told = limits.step_timeout_s, turn_rewards
        self._workers = workers_for(environment, limits.workers, *told) if limits.workers else []
        self._places: Sequence[Objects | Worker] = self._workers or [Objects(environment, *told)]
        self._episodes: dict[int, RunningEpisode] = {}  # episodes that have not ended
        self._count = 0  # episodes in the rollout
        self._failures: list[Failure] = []
        self._answered: Counter[str] = Counter()  # answered starts, steps and final rewards of the rollout
        self._late: Counter[str] = Counter()  # calls that took too long
        self._warned: set[str] = set()

    def start(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Started]:
        """Begin the episodes of a rollout, numbered from 0. Closes the environments of the previous rollout.

        The seeds are in [0, 2^31), and the same for all episodes of a group.

        Returns:
            For each episode the messages to add after its prompt, or the reason why it is left out.

        Raises:
            EpisodeError: If more than `max_failed_share` of the episodes have failed, or the first ones all took too long.
            HybridLightningError: If an environment raises one.
        """
        assert len(prompts) == len(seeds), f"{len(seeds)} seeds for {len(prompts)} prompts"
        self.finish()
        self._count, self._failures = len(prompts), []
        self._answered, self._late = Counter(), Counter()
        self._episodes = {
            number: RunningEpisode(number, prompt, int(seed), place, self.limits.step_timeout_s)
            for number, (prompt, seed, place) in enumerate(zip(prompts, seeds, cycle(self._places), strict=False))
        }
        answers = self._ask("start", {number: episode.answer(None) for number, episode in self._episodes.items()})
        return [answers[number] for number in range(len(prompts))]

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step | Failure | TimedOut]:
        """Pass the policy's messages to the environments, by episode number. Episodes end if the environment fails or is late.

        Raises:
            EpisodeError, HybridLightningError: See `start`.
        """
        answers = self._ask("step", {number: self._episodes[number].answer(message) for number, message in messages.items()})
        return {number: answers[number] for number in messages}

    def conclude(self, numbers: Iterable[int]) -> dict[int, float | Failure]:
        """End episodes that have not ended, and close their environments.

        Returns:
            Episode number -> its final reward (besides the rewards of its turns), or the reason why it is left out after all.

        Raises:
            EpisodeError, HybridLightningError: See `start`.
        """
        ended = [number for number in numbers if number in self._episodes]
        earned: dict[int, Any] = dict.fromkeys(ended, 0.0)
        if type(self.environment).final_reward is not Environment.final_reward:
            earned = self._ask("final reward", {number: self._episodes[number].final_reward() for number in ended})
        self.finish(ended)
        return earned

    def finish(self, numbers: Iterable[int] | None = None) -> None:
        """Close the environments of these episodes that are not yet closed; None for all."""
        ended = [number for number in (list(self._episodes) if numbers is None else numbers) if number in self._episodes]
        episodes = [self._episodes.pop(number) for number in ended]
        if episodes and type(self.environment).close is not Environment.close:
            for together in filter(None, (episodes[:1], episodes[1:])):  # if the first one hangs, the others get less time
                with suppress(LoopLostError):
                    self._run(_together([episode.close() for episode in together]))
        for episode in episodes:
            episode.forget()
        self._warn_close(episodes)

    def close(self) -> None:
        """Finish all episodes and end all processes. Episodes may be started again."""
        self.finish()
        run_async(self._end_workers())

    async def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _ask(self, kind: str, works: Mapping[int, Coroutine[Any, Any, Any]]) -> dict[int, Any]:
        """The answers of environments, in the order of arrival."""
        answers: dict[int, Any] = {}

        def note(number: int, answer: Any) -> None:
            if number not in answers:  # an abandoned event loop may continue
                answers[number] = answer
                self._note(kind, number, answer)

        async def one(number: int, work: Coroutine[Any, Any, Any]) -> None:
            note(number, await work)

        try:
            self._run(_together([one(*item) for item in works.items()]))
        except LoopLostError as lost:
            late = (
                f"{type(self.environment).__name__}: {lost} (episodes.step_timeout_s={self.limits.step_timeout_s:g} s), and with "
                "it all its episodes; `await` slow calls, or make the method or tool an ordinary function"
            )
            for number in works.keys() - answers.keys():
                self._episodes[number].forget()
                note(number, TimedOut(late) if kind == "step" else Failure(late, late=True))
        return answers

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        if self._workers:
            run_async(work, on_wait=self._on_wait)
            return
        with self._process_kept():
            run_async(work, max(_BLOCKED_S, self.limits.step_timeout_s), self._on_wait)

    def _note(self, kind: str, number: int, answer: _Answer) -> None:
        self._answered[kind] += 1
        if isinstance(answer, (Failure, TimedOut)):
            self._warn_close([self._episodes.pop(number)])
        if isinstance(answer, TimedOut) or (isinstance(answer, Failure) and answer.late):
            background = "such a call continues in the background; with episodes.workers its process is ended"
            self._warn("time", f"{answer.reason}; {background}" if not self._workers else answer.reason)
            self._late[kind] += 1
            if self._late[kind] == self._answered[kind] == _HOPELESS:
                raise EpisodeError(
                    f"the first {_HOPELESS} calls for a {kind} in a rollout all took too long, the last one: {answer.reason}; "
                    "fix the environment, or raise episodes.step_timeout_s"
                )
        if isinstance(answer, Failure):
            self._failures.append(answer)
            if len(self._failures) > self.limits.max_failed_share * self._count:
                raise EpisodeError(
                    f"the environment failed in {len(self._failures)} of {self._count} episodes, more than "
                    f"episodes.max_failed_share={self.limits.max_failed_share:g}: {self._failures[0].reason}; fix the "
                    "environment, or raise the share"
                )

    @contextmanager
    def _process_kept(self) -> Iterator[None]:
        """Restore the states of the global generators and the working folder, which training and environments share.

        A rollout ahead of training runs in its own thread and cannot do this, since the main thread continues in the meantime.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, folder = random_states(), os.getcwd()
        try:
            yield
        finally:
            os.chdir(folder)
            if not same_random_states(before, random_states()):
                restore_random_states(before)
                self._warn(
                    "global generators",
                    f"{type(self.environment).__name__} draws from the global random generators of Python, NumPy or torch, which "
                    "all episodes share, so its seed does not make it repeatable; set episodes.workers: in processes, each "
                    "episode has its own generator states",
                )

    def _warn_close(self, episodes: Iterable[RunningEpisode]) -> None:
        for fault in filter(None, (episode.close_fault for episode in episodes)):
            self._warn("close", f"{fault}; its resources may not be freed, and further such faults are not logged")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", text)


async def _together(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await all; the first exception cancels the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
