"""`RunningEpisodes`: the environments of a rollout, side by side, with their bounds and faults."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, Literal

from hybrid_lightning.configurable import Configurable
from hybrid_lightning.environments.environment import Environment, Step
from hybrid_lightning.environments.local_episodes import (
    CLOSE_S,
    Answer,
    Episode,
    Failure,
    LocalEpisodes,
    PassedOnError,
    Started,
    TimedOut,
    late_message,
)
from hybrid_lightning.environments.process_state import ProcessSettings, RandomStates, exits_said
from hybrid_lightning.environments.workers import Workers
from hybrid_lightning.errors import ConfigError, EpisodeError
from hybrid_lightning.types import Message, Prompt

logger = logging.getLogger(__name__)


class EpisodeLimits(Configurable):
    """Bounds of episodes.

    Args:
        max_turns: Messages of the policy in an episode; it then ends with the reason "turns".
        max_tokens: Tokens of an episode behind its prompt, sampled and added; it then ends with the reason "tokens".
        step_timeout_s: Seconds for each call of an environment. A step that takes longer ends its episode with the reason "time".
        too_long: What happens to an answer of the environment that would not fit into `max_tokens`: "cut" ends it in a mark,
            "end" leaves it out and ends the episode with the reason "tokens".
        max_failed_share: Share of the episodes of a rollout that may be left out since their environment failed; with more the
            run stops.
        workers: Number of processes in which environments run, each one at a time: for those that change global state, take much
            processor time or hang. 0: in this process. Each rollout that is under way (`rollouts_ahead`) has as many of its own.

    Raises:
        ConfigError: If a value is impossible.
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

    Each episode has an object of its own. Episodes are independent of each other: what one of them does, and in which order they
    are done, changes nothing for another. An environment that fails by its own fault (it raises, or answers something odd) is
    begun again with the same seed, at most twice, and gets the policy's messages again.

    Args:
        environment: The object of the config, prepared for the model.
        limits: Bounds of the episodes.
        on_wait: Called from time to time while processes are waited for; an exception from it ends these.

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
        >>> episodes.close()
    """

    def __init__(self, environment: Environment, limits: EpisodeLimits, on_wait: Callable[[], None] = lambda: None) -> None:
        self.environment, self.limits = environment, limits
        self._episodes: dict[int, Episode] = {}  # those that have not ended
        self._count = 0  # episodes of the rollout
        self._failures: list[Failure] = []
        self._warned: set[str] = set()
        self._here: LocalEpisodes | None = None
        self._workers = Workers(environment, limits.workers, limits.step_timeout_s, on_wait) if limits.workers else None

    def start(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Started]:
        """Begin the episodes of a rollout, which are numbered from 0; those of the rollout before are over.

        The seeds are in [0, 2^31), and the same for all episodes of a group.

        Returns:
            For each episode the messages behind those of its prompt, or why it is left out.

        Raises:
            EpisodeError: If more than `max_failed_share` of the episodes have failed.
            HybridLightningError: Whatever of that kind an environment raises.
        """
        assert len(prompts) == len(seeds), f"{len(seeds)} seeds for {len(prompts)} prompts"
        self.finish()
        self._count, self._failures = len(prompts), []
        pairs = enumerate(zip(prompts, seeds, strict=True))
        self._episodes = {number: Episode(number, prompt, int(seed)) for number, (prompt, seed) in pairs}
        answers = self._advance(dict.fromkeys(self._episodes))
        return [answers[number] for number in range(len(prompts))]  # type: ignore[misc]

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step | Failure | TimedOut]:
        """Let the environments answer messages of the policy, by number of the episode; who are over by that are finished.

        Raises:
            EpisodeError, HybridLightningError: See `start`.
        """
        answers = self._advance(messages)
        self.finish([number for number, answer in answers.items() if isinstance(answer, Step) and answer.over])
        return {number: answers[number] for number in messages}  # type: ignore[misc]

    def finish(self, numbers: Iterable[int] | None = None) -> None:
        """Close the environments of these episodes, as far as they are not yet closed; None for all."""
        ended = [number for number in (list(self._episodes) if numbers is None else numbers) if number in self._episodes]
        if not ended:
            return
        for number in ended:
            del self._episodes[number]
        if self._workers is not None:
            self._workers.end(ended)
            self._warn_close(self._workers.close_fault)
        elif self._here is not None:
            self._run(self._here, self._here.end(ended), min(CLOSE_S, self.limits.step_timeout_s))

    def close(self) -> None:
        """Finish all episodes and end all processes. Episodes may be started again."""
        self.finish()
        if self._workers is not None:
            self._workers.close()
        if self._here is not None:
            self._here.loop.call_soon_threadsafe(self._here.loop.stop)
            self._here = None

    def _advance(self, messages: Mapping[int, Message | None]) -> dict[int, Answer]:
        """The answers to messages, in the order in which they came."""
        answers: dict[int, Answer] = {}

        def note(number: int, answer: Answer) -> None:
            answers[number] = answer
            self._note(number, messages[number], answer)

        while waiting := {number: message for number, message in messages.items() if number not in answers}:
            if self._workers is not None:
                self._workers.advance([(self._episodes[number], message) for number, message in waiting.items()], note)
                continue
            if self._here is None:
                self._here = LocalEpisodes(self.environment, self.limits.step_timeout_s)
                self._here.thread.start()
            here = self._here

            async def one(number: int, message: Message | None, here: LocalEpisodes = here) -> None:
                answer = await here.advance(self._episodes[number], message)
                if not here.given_up:
                    note(number, answer)

            holding = self._run(here, _together([one(*item) for item in waiting.items()]), self.limits.step_timeout_s)
            if holding is not None and holding in waiting and holding not in answers:
                episode = self._episodes[holding]
                method, turn = ("start", 0) if waiting[holding] is None else ("step", len(episode.turns) + 1)
                limit = f"episodes.step_timeout_s={self.limits.step_timeout_s:g}"
                text = late_message(here.name, method, limit, episode.place(turn))
                note(holding, Failure(text) if waiting[holding] is None else TimedOut(text))
        return answers

    def _note(self, number: int, message: Message | None, answer: Answer) -> None:
        episode = self._episodes[number]
        if isinstance(answer, Step):
            assert message is not None
            episode.turns.append((message, answer))
        elif isinstance(answer, tuple):
            episode.started = answer
        else:
            del self._episodes[number]
        if isinstance(answer, TimedOut) and self._workers is None:
            text = "such a call goes on in the background, where it takes processor time and may change global state"
            self._warn("time", f"{answer.reason}; {text}: with episodes.workers its process is ended")
        if isinstance(answer, Failure):
            self._failures.append(answer)
            if len(self._failures) > self.limits.max_failed_share * self._count:
                raise EpisodeError(
                    f"the environment failed in {len(self._failures)} of {self._count} episodes, more than "
                    f"episodes.max_failed_share={self.limits.max_failed_share:g}: {self._failures[0].reason}; mend the "
                    "environment, or raise the share"
                )

    def _run(self, here: LocalEpisodes, work: Coroutine[Any, Any, None], limit_s: float) -> int | None:
        """Run something on the event loop of the episodes, which an environment's code may hold up for `limit_s`.

        Returns:
            The number of an episode whose code has held it up for longer, whereby all objects are lost, since their coroutines
            belong to it; None if all went well.
        """
        ours, settings, folder = RandomStates.now(), ProcessSettings(), os.getcwd()
        with exits_said(here.name):
            future = asyncio.run_coroutine_threadsafe(work, here.loop)
            try:
                while not future.done() and here.thread.is_alive():
                    with suppress(TimeoutError, CancelledError):
                        future.result(min(1.0, limit_s / 4))
                    holding = here.holds_up
                    if not future.done() and holding is not None and time.monotonic() - holding[1] > limit_s:
                        here.given_up, self._here = True, None
                        self._episodes = {number: episode.lost() for number, episode in self._episodes.items()}
                        return holding[0]
                if future.cancelled() or not here.thread.is_alive():
                    self._here = None
                    raise EpisodeError(
                        f"{here.name} has stopped the event loop, or cancelled tasks, of all its episodes; let it end its own "
                        "tasks alone, or run it in processes (episodes.workers)"
                    )
                future.result()  # what it has raised
                if not ours.same(RandomStates.now()):
                    how = "in threads of its own" if here.own_states else "although it is thread_safe"
                    remedy = "" if here.own_states else "set thread_safe = False in the class, or "
                    self._warn(
                        "global generators",
                        f"{here.name} draws from the global random generators of Python, NumPy or torch {how}, so that its "
                        f"episodes may depend on each other; {remedy}run it in processes (episodes.workers)",
                    )
            except PassedOnError as passed:
                raise passed.error from None
            finally:
                future.cancel()  # after Ctrl-C
                ours.restore()
                os.chdir(folder)
                if changed := settings.restore():
                    self._warn(
                        "settings",
                        f"{here.name} changes {', '.join(changed)} for the whole process, which is undone after each answer; run "
                        "it in processes (episodes.workers), where it keeps what it sets",
                    )
        self._warn_close(here.close_fault)
        return None

    def _warn_close(self, fault: str) -> None:
        if fault:
            self._warn("close", f"{fault}; what it has used may not be free, and further such faults are not shown")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", text)


async def _together(works: list[Coroutine[Any, Any, None]]) -> None:
    """Await all; the first exception cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except Exception as error:
        for task in tasks:
            task.cancel()
        raise error if isinstance(error, PassedOnError) else PassedOnError(error) from error
