import asyncio
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import fork_server
import numpy as np
import pytest
import torch
from environments_in_turns import EnvironmentsInTurns

from hybrid_lightning.environments import Environment, EpisodeLimits, Failure, Step, TimedOut
from hybrid_lightning.errors import ConfigError, EpisodeError, SandboxError
from hybrid_lightning.types import Prompt

SEEDS = [7, 7, 8, 8]
LOG = Counter()


def prompts(count=4):
    groups = [Prompt(text="Go", index=index, source="games.csv", columns={"list": [1]}) for index in range(count // 2 + 1)]
    return [groups[number // 2] for number in range(count)]


def said(text):
    return {"role": "assistant", "content": text}


def play(environment, *turns, seeds=SEEDS, share=1.0, workers=0, timeout_s=30.0):
    """The texts of the answers to the start and to each turn, by episode: one text for all, or a text each."""
    episodes = EnvironmentsInTurns(environment, EpisodeLimits(max_failed_share=share, workers=workers, step_timeout_s=timeout_s))
    try:
        answers = [dict(enumerate(episodes.start(prompts(len(seeds)), seeds)))]
        for turn in turns:
            texts = turn if isinstance(turn, dict) else dict.fromkeys(range(len(seeds)), turn)
            answers.append(episodes.step({number: said(text) for number, text in texts.items()}))
    finally:
        episodes.close()
    return [{number: shown(answer) for number, answer in row.items()} for row in answers]


def shown(answer):
    if isinstance(answer, (Failure, TimedOut)):
        return answer
    messages = answer.messages if isinstance(answer, Step) else answer
    return " | ".join(message["content"] for message in messages)


class Draws(Environment):
    """Seeds and draws from all global generators, counts its own turns, changes what it was given, and the working folder."""

    def __init__(self, words=("none",)):
        self.words = words

    def start(self, prompt, seed):
        random.seed(seed)
        np.random.seed(seed)
        prompt.columns["list"].append(2)
        os.chdir("..")
        self.turn = 0
        return f"{random.random()} {prompt.columns['list']} {self.words}"

    def step(self, message):
        asyncio.run(asyncio.sleep(0))  # as clients do that hide an event loop
        self.turn += 1
        self.words.append("mine")
        message["content"] = "changed"
        return Step(f"{self.turn} {self.words} {random.random()} {np.random.rand()} {torch.rand(1).item()}", over=self.turn == 3)


class AsyncDraws(Environment):
    """Draws between waits, also in tasks of its own."""

    async def start(self, prompt, seed):
        return str(random.random())

    async def step(self, message):
        await asyncio.sleep(0.01 * random.random())
        return f"{await asyncio.gather(self.one(), self.one())} {await self.one()}", 0, False

    async def one(self):
        await asyncio.sleep(0)
        return random.random(), np.random.rand()


def test_what_draws_from_global_generators_touches_nothing_of_the_run_and_is_told_to_use_processes(caplog):
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), os.getcwd()
    for kind in (Draws, AsyncDraws):
        caplog.clear()
        play(kind(), "now", "now") if kind is AsyncDraws else play(kind(["word"]), "now", "now")
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), os.getcwd()) == before
        (record,) = caplog.records
        assert f"{kind.__name__} draws from the global random generators" in record.message and "workers" in record.message


@pytest.mark.long
def test_in_processes_the_members_of_a_group_get_the_same_whatever_the_others_do(forked):
    for kind, workers in ((lambda: Draws(["word"]), 2), (AsyncDraws, 1)):
        answers = play(kind(), "now", {3: "now", 1: "now", 2: "now", 0: "now"}, workers=workers)
        for row in answers:
            assert row[0] == row[1] != row[2] == row[3]
        alone = play(kind(), "now", "now", seeds=[8], workers=workers)
        assert [row[0] for row in alone] == [row[2] for row in answers]


class Faulty(Environment):
    """Fails in the given way at the second turn; LOG counts its calls."""

    def __init__(self, when="", times=99):
        self.when, self.times = when, times
        LOG["new"] += 1
        self.fail("new")

    def fail(self, place):
        if self.when == place and LOG["new"] > 1 and LOG[place + " failed"] < self.times:  # the first one is the config's
            LOG[place + " failed"] += 1
            raise ZeroDivisionError("no\nluck")

    def start(self, prompt, seed):
        self.turn, self.seed = 0, seed
        self.fail("start")
        return f"begin {LOG['new']}" if self.when == "other start" else "begin"

    def step(self, message):
        self.turn += 1
        if self.turn == 2 and message["content"] == "go":
            self.fail("step")
            if self.when == "exit":
                raise SystemExit(3)  # and not sys.exit, which W&B replaces where it has been imported
            if self.when == "interrupt":
                raise KeyboardInterrupt
            if self.when == "stop iteration":
                raise StopIteration
            if self.when.startswith("other") and LOG["other"] < 1:
                LOG["other"] += 1
                raise ValueError
        said, message["content"] = message["content"], "changed"
        return f"{self.turn} {said} {LOG['new'] if self.when == 'other step' else ''}", 0.5, False

    def close(self):
        LOG["close"] += 1
        self.fail("close")
        time.sleep(1_000 * (self.when == "close hangs"))


@pytest.fixture(autouse=True)
def clear():
    LOG.clear()


@pytest.fixture
def forked(monkeypatch):
    """Lets workers be forked: importing torch takes each fresh one seconds."""
    monkeypatch.setattr(subprocess, "Popen", fork_server.Forked)


@pytest.mark.parametrize(("place", "closed"), [("new", 1), ("start", 3), ("step", 3)])
def test_what_fails_by_its_own_fault_is_begun_again_with_what_was_said(place, closed):
    answers = play(Faulty(place, 2), "hi", "go", "on", seeds=[7])
    assert answers == [{0: "begin"}, {0: "1 hi "}, {0: "2 go "}, {0: "3 on "}]
    assert LOG["new"] == 4 and LOG["close"] == closed  # of each that was made


@pytest.mark.parametrize(
    ("when", "said_of_it"),
    [
        ("start", r"Faulty.start raised ZeroDivisionError: no luck \(test_running.py line \d+\) at the start of games.csv row 0"),
        ("step", r"Faulty.step raised ZeroDivisionError: no luck \(test_running.py line \d+\) at turn 2 of games.csv row 0 \(s"),
        ("exit", r"Faulty.step raised SystemExit: 3 \(test_running.py line \d+\) at turn 2"),
        ("interrupt", r"Faulty.step raised KeyboardInterrupt: "),  # nobody's Ctrl-C
        ("stop iteration", r"Faulty.step raised StopIteration"),
        ("other step", r"Faulty answered differently at turn 1 .* started again after a fault; derive all its rand"),
        ("other start", r"Faulty answered differently at the start of .* started again after a fault"),
    ],
)
def test_whatever_keeps_failing_is_left_out_with_the_reason_and_the_others_continue(when, said_of_it):
    *_, last = play(Faulty(when), *([{0: "hi", 1: "hi"}, {0: "go", 1: "else"}] if when != "start" else []), seeds=[7, 7])
    assert isinstance(last[0], Failure) and "\n" not in last[0].reason
    assert re.match(said_of_it, last[0].reason), last[0].reason
    assert when == "start" or last[1].startswith("2 else")
    assert LOG["new"] == 1 + (2 * 3 if when == "start" else 3 + 1)  # the one of the config, and three for each that fails
    assert LOG["close"] == LOG["new"] - 1


def test_what_goes_wrong_in_close_is_said_once(caplog):
    play(Faulty("close"), "hi")
    assert [record.message.count("Faulty.close raised ZeroDivisionError") for record in caplog.records] == [1]
    assert LOG["close"] == 4
    caplog.clear()
    LOG.clear()
    began = time.monotonic()
    play(Faulty("close hangs"), "hi", timeout_s=3)
    assert LOG["close"] == 4 and time.monotonic() - began < 9, "later ones are not waited for as long"
    assert [record.message.count("Faulty.close took more than 3 s") for record in caplog.records] == [1]


def test_an_error_that_is_not_an_environments_ends_the_run():
    class Stops(Environment):
        def step(self, message):
            raise SandboxError("no sandbox")

    class AsyncStops(Environment):
        async def step(self, message):
            await asyncio.gather(Stops().step(message))

    for kind in (Stops, AsyncStops):
        with pytest.raises(SandboxError):
            play(kind(), "go")


class Slow(list):
    def __iter__(self):
        time.sleep(1_000)


class Hangs(Environment):
    def start(self, prompt, seed):
        if seed == 99:
            LOG["hangs"] += 1
            time.sleep(1_000)
        self.texts = []

    def step(self, message):
        self.texts.append(message["content"])
        if message["content"] == "hang":
            time.sleep(1_000)
        if message["content"] == "read":
            return Slow(), 0, False
        if message["content"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return " ".join(self.texts), 0, False


class AsyncHangs(Hangs):
    async def step(self, message):
        LOG[message["content"]] += 1
        try:
            await asyncio.sleep(1_000 * (message["content"] == "hang"))
        except asyncio.CancelledError:
            await asyncio.sleep(1_000)  # it does not want to end
        return super().step({**message, "content": message["content"].replace("blocks", "hang")})


@pytest.mark.parametrize(("kind", "how"), [(Hangs, "hang"), (AsyncHangs, "hang"), (Hangs, "read")])
def test_a_step_that_hangs_ends_its_episode_alone_and_is_said_with_its_name(kind, how, caplog):
    turns = "hi", {0: "now", 1: how, 2: "now", 3: "now"}, {0: "on", 2: "on", 3: "on"}
    *_, second, third = play(kind(), *turns, timeout_s=2)
    assert isinstance(second.pop(1), TimedOut) and set(second.values()) == {"hi now"}
    assert set(third.values()) == {"hi now on"}
    assert f"{kind.__name__}.step took more than episodes.step_timeout_s=2 s at turn 2 of games.csv row 0" in caplog.text


def test_what_blocks_the_event_loop_ends_the_turn_for_those_that_wait_with_it_and_no_call_is_made_again(caplog):
    *_, second, third = play(AsyncHangs(), "hi", {0: "now", 1: "blocks", 2: "later"}, {3: "on"}, timeout_s=2)
    assert isinstance(second[1], TimedOut) and isinstance(second[2], TimedOut) and third == {3: "hi on"}
    assert LOG["blocks"] == LOG["now"] == 1 and LOG["later"] <= 1
    assert "AsyncHangs: code on the event loop has blocked it" in caplog.text and "`await` slow calls" in caplog.text


def test_a_start_that_hangs_is_left_out():
    (answers,) = play(Hangs(), seeds=[7, 99], timeout_s=2)
    assert answers[0] == "" and isinstance(answers[1], Failure) and "Hangs.start took more than" in answers[1].reason
    assert LOG["hangs"] == 1  # which was long enough


def test_a_rollout_in_which_all_first_steps_hang_stops_the_run(caplog):
    for kind, turns in ((Hangs, ["hang"]), (AsyncHangs, ["hang"]), (Hangs, [])):
        caplog.clear()
        what = "step" if turns else "start"
        hopeless = f"first 8 calls for a {what} in a rollout all took .* the last one: {kind.__name__}.{what}"
        with pytest.raises(EpisodeError, match=hopeless):
            play(kind(), *turns, seeds=[7 if turns else 99] * 10, timeout_s=0.1)
        assert len([record for record in caplog.records if f"{kind.__name__}.{what} took more than" in record.message]) == 1
    *_, last = play(Hangs(), {n: "hang" if n else "fine" for n in range(10)}, seeds=[7] * 10, timeout_s=2)
    assert last[0] == "fine" and sum(isinstance(answer, TimedOut) for answer in last.values()) == 9


def test_a_process_that_hangs_or_dies_is_another_one_for_its_other_episodes(forked):
    turns = "hi", {0: "now", 1: "hang", 2: "die", 3: "now"}, {0: "on", 3: "on"}
    *_, second, third = play(Hangs(), *turns, workers=2, timeout_s=2.0)
    assert isinstance(second[1], TimedOut) and "at turn 2 of games.csv row 0 (seed 7)" in second[1].reason
    assert isinstance(second[2], Failure) and "Hangs.step ended its process with exit code -9 at turn 2" in second[2].reason
    assert third == {0: "hi now on", 3: "hi now on"}


class Shows(Environment):
    """Its process, and what it sees."""

    def step(self, message):
        if message["content"] == "raise":
            raise SandboxError("no sandbox")
        return f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']!r} {self.chat_template}", 0, False


def test_processes_see_no_gpu_know_the_template_and_end_with_the_run(forked):
    environment = Shows()
    environment.prepare("{{ messages }}")
    episodes = EnvironmentsInTurns(environment, EpisodeLimits(workers=2))
    try:
        for _ in range(2):  # rollouts
            episodes.start(prompts(), SEEDS)
            answers = episodes.step({number: said("hi") for number in range(4)})
        with pytest.raises(SandboxError, match="no sandbox"):
            episodes.step({0: said("raise")})
    finally:
        episodes.close()
    ids, seen = zip(*(shown(answer).split(" ", 1) for answer in answers.values()), strict=True)
    assert ids[0] == ids[2] != ids[1] == ids[3] and set(seen) == {"'' {{ messages }}"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(ids[0]), 0)


def test_processes_end_where_their_parent_is_killed():
    code = """
import os, signal
from hybrid_lightning.environments import EpisodeLimits, GuessNumber, RunningEpisodes
from hybrid_lightning.types import Prompt
from hybrid_lightning.shared.user_calls import run_async
episodes = RunningEpisodes(GuessNumber(), EpisodeLimits(workers=1))
run_async(episodes.start(0, Prompt(text="Go"), 1))
print(episodes._workers[0]._popen.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = fork_server.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    stat, until = Path(f"/proc/{int(ran.stdout)}/stat"), time.monotonic() + 60
    assert ran.returncode == -signal.SIGKILL
    # A zombie is dead, and not yet collected.
    while (is_there := stat.exists() and stat.read_text().split()[2] != "Z") and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_there


def test_what_cannot_run_is_refused_at_once(monkeypatch):
    class Alone(Environment):
        def new(self):
            return self

        def step(self, message):
            return None

    with pytest.raises(ConfigError, match=r"Alone\.new returns the same object for all episodes, which would share"):
        play(Alone())
    with pytest.raises(ConfigError, match=r"episodes.workers=1: Alone cannot be made in another process: .*top level of a"):
        play(Alone(), workers=1)
    monkeypatch.delattr(os, "killpg")  # as on Windows
    with pytest.raises(ConfigError, match=r"episodes\.workers=1 needs Linux or macOS: .*; leave it out, or train under WSL"):
        play(Shows(), workers=1)


class Threads(Environment):
    """Notes in which threads its steps run, and how many at a time."""

    thread_safe = True
    seen: ClassVar[set[threading.Thread]] = set()
    inside, most = 0, 0
    lock = threading.Lock()

    def step(self, message):
        with self.lock:
            Threads.inside += 1
            Threads.most = max(Threads.most, Threads.inside)
            self.seen.add(threading.current_thread())
        time.sleep(float(message["content"]))
        with self.lock:
            Threads.inside -= 1
        return "ok", 1, False


class ThreadEach(Threads):
    """Holds what belongs to a thread, and begins by what it seeds."""

    thread_safe = False
    seen: ClassVar[set[threading.Thread]] = set()

    def start(self, prompt, seed):
        self.rows = sqlite3.connect(":memory:")
        random.seed(seed)
        time.sleep(0.001)
        return str(random.random())

    def step(self, message):
        return f"{super().step(message)[0]} {self.rows.execute('select 1').fetchone()[0]}", 1, False


def test_steps_run_side_by_side_in_few_threads_or_one_for_each_episode(caplog):
    play(Threads(), "0", seeds=[1] * 200)
    assert len(Threads.seen) <= 64  # a thread for each call would take longer than the calls
    assert play(Threads(), "1", seeds=[1] * 40)[1] == dict.fromkeys(range(40), "ok") and Threads.most >= 20
    assert not caplog.records
    Threads.most, before = 0, threading.active_count()
    assert play(ThreadEach(), "1", "1", seeds=[1] * 16)[1] == dict.fromkeys(range(16), "ok 1")
    assert len(ThreadEach.seen) == Threads.most == 16
    until = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < until, "threads of episodes that are over"
        time.sleep(0.01)


class EarnsAtEnd(Environment):
    """Earns half a point for each turn, at the end."""

    def start(self, prompt, seed):
        self.turns = 0

    def step(self, message):
        self.turns += 1
        return message["content"], 0, False

    async def final_reward(self):
        LOG["asked"] += 1
        return 0.5 * self.turns / (0 if self.turns == 3 else 1)


def test_what_is_earned_at_the_end_is_asked_once(forked):
    for workers in (0, 1):
        LOG.clear()
        episodes = EnvironmentsInTurns(EarnsAtEnd(), EpisodeLimits(max_failed_share=1, workers=workers))
        episodes.start(prompts(3), [7, 7, 8])
        for going in ([0, 1, 2], [1, 2], [2]):
            episodes.step({number: said("go") for number in going})
        earned = episodes.conclude([0, 1, 2])
        assert (earned[0], earned[1]) == (0.5, 1.0) and "EarnsAtEnd.final_reward raised Zero" in earned[2].reason
        assert episodes.conclude([0, 1, 2]) == dict.fromkeys(range(3), 0.0) and LOG["asked"] == (0 if workers else 3)
        episodes.close()


WRONG = {"max_turns": (0, 1.5), "max_tokens": (0,), "step_timeout_s": (0, float("nan")), "workers": (-1, True)}
WRONG |= {"too_long": ("drop",), "max_failed_share": (1.1,)}


def test_impossible_limits_are_refused():
    for name, value in ((name, value) for name, values in WRONG.items() for value in values):
        with pytest.raises(ConfigError, match=rf"episodes.{name}={value!r}; give "):
            EpisodeLimits(**{name: value})
