"""`RunningEpisodes`: runs the environments of a rollout concurrently, with their limits and faults."""

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from math import inf
from typing import Any, Literal

from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.environments.objects import Objects, random_states, restore_random_states, same_random_states
from hybrid_lightning.environments.running_episode import Failure, RunningEpisode, Started, TimedOut
from hybrid_lightning.environments.workers import Worker, workers_for
from hybrid_lightning.errors import ConfigError, EpisodeError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.shared.user_calls import LoopLostError, run_async
from hybrid_lightning.types import Message, Prompt

logger = logging.getLogger(__name__)
BLOCKED_S = 2.0  # how long a busy machine may keep the event loop from running
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


class Faults:
    """The episodes of a rollout that are left out, and the calls that took too long; ends the run if there are too many.

    Args:
        limits: Limits of the episodes.
        name: What fails: environment or agent.
        timeout: Option with the time limit of a call.
        hopeless: Whether the run also ends if the first eight episodes are all left out.
    """

    def __init__(
        self, limits: EpisodeLimits, name: str = "environment", timeout: str = "episodes.step_timeout_s", hopeless: bool = False
    ) -> None:
        self._limits, self._name, self._timeout, self._hopeless = limits, name, timeout, hopeless
        self.begin(0)

    def begin(self, count: int) -> None:
        """Begin a rollout of this many episodes."""
        self._count, self._failures = count, list[Failure]()
        self._answered = Counter[str]()  # answered calls, by kind
        self._late = Counter[str]()  # calls that took too long

    def note(self, kind: str, answer: Any) -> None:
        """Note the answer to a call.

        Raises:
            EpisodeError: If too many calls took too long, or too many episodes have failed.
        """
        self._answered[kind] += 1
        if isinstance(answer, TimedOut) or (isinstance(answer, Failure) and answer.late):
            self._late[kind] += 1
            if self._late[kind] == self._answered[kind] == _HOPELESS:
                raise EpisodeError(
                    f"the first {_HOPELESS} calls for a {kind} in a rollout all took too long, the last one: {answer.reason}; "
                    f"fix the {self._name}, or raise {self._timeout}"
                )
        if isinstance(answer, Failure):
            self._failures.append(answer)
            many = len(self._failures) > self._limits.max_failed_share * self._count
            if many or (self._hopeless and len(self._failures) == self._answered[kind] == _HOPELESS):
                more = f", more than episodes.max_failed_share={self._limits.max_failed_share:g}" if many else ", the first ones"
                remedy = ", or raise the share" if many else ""
                raise EpisodeError(
                    f"the {self._name} failed in {len(self._failures)} of {self._count} episodes{more}: "
                    f"{self._failures[0].reason}; fix the {self._name}{remedy}"
                )


@contextmanager
def process_kept(on_change: Callable[[], object]) -> Iterator[None]:
    """Restore the states of the global generators and the working folder, which training and the user's code share.

    Used while the main thread waits for code in this process; `on_change` is called if it has drawn random numbers. A rollout
    ahead of training cannot do this, since the main thread continues in the meantime.
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
            on_change()


class RunningEpisodes:
    """The environments of the episodes of a rollout; its methods are awaited on the event loop of `user_calls`.

    Each episode has its own object. Episodes are independent: one episode's actions and timing do not affect another. An
    environment that fails (it raises, or returns a malformed answer) is started again with the same seed, at most twice, and the
    policy's messages are replayed.

    In this process `async` methods are awaited together, and ordinary methods run in threads, one per episode (see
    `Environment.thread_safe`). The states of the global random generators and the working folder are restored afterwards (see
    `process_kept`), but the episodes share them: draws from global generators are repeatable only with `limits.workers`.

    Args:
        environment: The object of the config, prepared for the model.
        limits: Limits of the episodes.
        turn_rewards: Whether the reward of each turn counts by itself (see `Environment.turn_rewards`).

    Raises:
        EpisodeError: From every method that waits, if more than `max_failed_share` of the episodes have failed, or if the first
            calls of a kind all took too long. HybridLightningError if an environment raises one.

    Example:
        >>> class Echo(Environment):
        ...     def step(self, message):
        ...         return f"You said {message['content']}", 1.0, message["content"] == "bye"
        >>> async def play(episodes):
        ...     started = await episodes.start(0, Prompt(text="Hello"), seed=5)
        ...     answer = await episodes.step(0, {"role": "assistant", "content": "bye"})
        ...     return started, answer.messages, answer.over, await episodes.conclude(0)
        >>> episodes = RunningEpisodes(Echo(), EpisodeLimits())
        >>> episodes.begin(count=1)
        >>> run_async(play(episodes))
        ((), ({'role': 'user', 'content': 'You said bye'},), True, 0.0)
        >>> episodes.close()
    """

    def __init__(self, environment: Environment, limits: EpisodeLimits, turn_rewards: bool = False) -> None:
        self.environment, self.limits = environment, limits
        told = limits.step_timeout_s, turn_rewards
        self._workers = workers_for(environment, limits.workers, *told) if limits.workers else []
        self._places: Sequence[Objects | Worker] = self._workers or [Objects(environment, *told)]
        self._episodes: dict[int, RunningEpisode] = {}  # episodes that have not ended
        self._faults = Faults(limits)
        self._warned: set[str] = set()

    @property
    def blocked_s(self) -> float:
        """Longest time in seconds for which code may block the event loop. Processes have their own loops."""
        return inf if self._workers else max(BLOCKED_S, self.limits.step_timeout_s)

    def begin(self, count: int) -> None:
        """Begin a rollout of this many episodes, after `finish` of the one before."""
        assert not self._episodes, "the rollout before has been finished"
        self._faults.begin(count)

    async def start(self, number: int, prompt: Prompt, seed: int) -> Started:
        """Begin an episode, with a seed in [0, 2^31) that is the same for all episodes of a group.

        Returns:
            The messages to add after its prompt, or the reason why it is left out.
        """
        place = self._places[number % len(self._places)]
        episode = self._episodes[number] = RunningEpisode(number, prompt, seed, place, self.limits.step_timeout_s)
        return await self._noted("start", episode, episode.answer(None))  # type: ignore[no-any-return]

    async def step(self, number: int, message: Message) -> Step | Failure | TimedOut:
        """Pass the policy's message to the environment. The episode ends if the environment fails or is late."""
        episode = self._episodes[number]
        return await self._noted("step", episode, episode.answer(message))  # type: ignore[no-any-return]

    async def conclude(self, number: int) -> float | Failure:
        """End an episode that has not failed, and close its environment.

        Returns:
            Its final reward (besides the rewards of its turns), or the reason why it is left out after all.
        """
        episode, earned = self._episodes.get(number), 0.0
        if episode is not None and type(self.environment).final_reward is not Environment.final_reward:
            earned = await self._noted("final reward", episode, episode.final_reward())
        if number in self._episodes:
            await self._close([self._episodes.pop(number)])
        return earned

    def lost(self, number: int, kind: str) -> TimedOut | Failure:
        """The answer to a call of this kind ("start", "step", "final reward") that was in progress on a lost event loop."""
        late = (
            f"{type(self.environment).__name__}: code on the event loop has blocked it (episodes.step_timeout_s="
            f"{self.limits.step_timeout_s:g} s), and with it all its episodes; `await` slow calls, or make the method or tool an "
            "ordinary function"
        )
        answer = TimedOut(late) if kind == "step" else Failure(late, late=True)
        if number in self._episodes:
            self._episodes[number].forget()
            self._note(kind, number, answer)
        return answer

    async def finish(self) -> None:
        """Close the environments that are not yet closed."""
        episodes, self._episodes = list(self._episodes.values()), {}
        for together in filter(None, (episodes[:1], episodes[1:])):  # if the first one hangs, the others get less time
            await self._close(together)

    def close(self) -> None:
        """Finish all episodes and end all processes. Episodes may be started again."""
        with suppress(LoopLostError):
            run_async(self.finish(), self.blocked_s)
        run_async(self._end_workers())

    async def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()

    async def _close(self, episodes: Sequence[RunningEpisode]) -> None:
        if type(self.environment).close is not Environment.close:
            await asyncio.gather(*(episode.close() for episode in episodes))
        for episode in episodes:
            episode.forget()
        self._warn_close(episodes)

    async def _noted(self, kind: str, episode: RunningEpisode, work: Coroutine[Any, Any, Any]) -> Any:
        answer = await work
        if self._episodes.get(episode.number) is episode:  # an abandoned event loop may continue
            self._note(kind, episode.number, answer)
        return answer

    def _note(self, kind: str, number: int, answer: _Answer) -> None:
        if isinstance(answer, (Failure, TimedOut)):
            self._warn_close([self._episodes.pop(number)])
        if isinstance(answer, TimedOut) or (isinstance(answer, Failure) and answer.late):
            background = "such a call continues in the background; with episodes.workers its process is ended"
            self._warn("time", f"{answer.reason}; {background}" if not self._workers else answer.reason)
        self._faults.note(kind, answer)

    def process_kept(self) -> AbstractContextManager[None]:
        """See `process_kept`; environments in other processes change nothing here."""
        if self._workers:
            return nullcontext()
        return process_kept(
            lambda: self._warn(
                "global generators",
                f"{type(self.environment).__name__} draws from the global random generators of Python, NumPy or torch, which "
                "all episodes share, so its seed does not make it repeatable; set episodes.workers: in processes, each "
                "episode has its own generator states",
            )
        )

    def _warn_close(self, episodes: Iterable[RunningEpisode]) -> None:
        for fault in filter(None, (episode.close_fault for episode in episodes)):
            self._warn("close", f"{fault}; its resources may not be freed, and further such faults are not logged")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", text)
