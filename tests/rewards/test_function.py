import asyncio
import pickle
import time
from copy import deepcopy

import pytest

from hybrid_lightning.errors import ConfigError, DataError, RewardError
from hybrid_lightning.rewards import ExactMatch, FunctionReward, RewardFunction, TRLReward, WeightedSum, evaluate_reward
from hybrid_lightning.rewards.combined import as_reward
from hybrid_lightning.types import Completion, Episode, Prompt

MINE = """
import asyncio, time
from dataclasses import dataclass

@dataclass
class Limits:
    words: int = 2

def batch(completions, answer, tolerance, **columns):
    assert set(columns) == {"prompts", "set_name", "note"}, columns
    return [float(abs(float(c) - float(a)) <= t) for c, a, t in zip(completions, answer, tolerance, strict=True)]

def trl_like(prompts, completions, tolerance, **kwargs):
    return [float(len(text)) for text in completions]

def each(completion, prompt, answer, note="none", missing=3):
    return float(completion == answer and prompt.answer == answer and note in ("n0", "n1") and missing == 3)

def brief(completion): return float(len(completion.split()) <= Limits().words)

async def judge(completion, answer):
    await asyncio.sleep(0.2)
    return float(completion == answer)

async def judge_batch(completions, answer): return [float(c == a) for c, a in zip(completions, answer)]

async def slow(completion):
    await asyncio.sleep(30 if completion == "slow" else 0)
    return 1.0

def sleepy(completion):
    time.sleep(30 if completion == "slow" else 0)
    return 1.0

def sleepy_batch(completions): time.sleep(30)
async def slow_batch(completions): await asyncio.sleep(30)

def near(completion, answer, tolerance=0.1, *, words: list = None):
    words.append(completion) if words else None
    return float(abs(float(completion) - float(answer)) <= tolerance and (words is None or len(words) == 2))

def near_batch(completions, answer, tolerance: "float", **columns):
    return [float(abs(float(c) - float(a)) <= tolerance and columns["unit"] == "km") for c, a in zip(completions, answer)]

def careless(completion): return 1 / int(completion)
async def careless_async(completion): return 1 / int(completion)
def careless_batch(completions): return [1 / int(text) for text in completions]
def nothing(completion): return None
def neither(text): return 1.0
def by_place(completions, /): return [1.0 for _ in completions]
def sorts(completions): completions.sort(); return [float(len(text)) for text in completions]
def leaves(completion): raise SystemExit(2)
clients = []

async def with_client(completion):
    loop = asyncio.get_running_loop()
    clients.append(loop)
    return float(all(client is loop and not client.is_closed() for client in clients))
"""
PROMPTS = [
    Prompt(text="?", answer="12", index=number, source="rows.jsonl", columns={"tolerance": number, "note": f"n{number}"})
    for number in range(2)
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scores(function, completions, **arguments):
    reward = FunctionReward(f"my_rewards.py:{function}", **arguments)
    prompts = (PROMPTS * len(completions))[: len(completions)]
    return evaluate_reward(reward, completions, prompts).total.tolist()


def test_a_batch_or_one_completion_at_a_time_with_columns_by_name(here):
    assert scores("batch", ["12", "13", "13"]) == [1.0, 1.0, 0.0]
    assert scores("trl_like", ["a", "bc"]) == [1.0, 2.0]
    assert scores("each", ["12", "12", "13"]) == [1.0, 1.0, 0.0]
    assert scores("brief", ["a b", "a b c"]) == [1.0, 0.0]
    assert scores("sorts", texts := ["bb", "a"]) == [1.0, 2.0] and texts == ["bb", "a"]  # its changes to the lists stay there


def test_a_reward_function_of_trl_sees_what_trl_gives_it():
    seen = []

    def theirs(prompts, completions, answer, **kwargs):
        seen.append((prompts, completions, kwargs))
        return [float(completion[0]["content"] == gold) for completion, gold in zip(completions, answer, strict=True)]

    asked = ({"role": "user", "content": "1+1"},)
    prompts = [Prompt(messages=asked, answer="2", index=index, columns={"level": 3}) for index in range(2)]
    episode = Episode((*asked, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}), 1, "answered", ())
    assert TRLReward(theirs)(["1", Completion("2", 1, True, episode=episode)], prompts) == [0.0, 1.0]
    ((given, completions, kwargs),) = seen
    assert given == [list(asked)] * 2 and kwargs == {"level": [3, 3], "set_name": ["", ""]}
    assert completions == [[{"role": "assistant", "content": "1"}], [dict(message) for message in episode.messages[1:]]]
    texts = TRLReward(lambda prompts, completions: [len(a + b) for a, b in zip(prompts, completions, strict=True)])
    assert texts(["ab"], [Prompt(text="1+1=")]) == [6]
    with pytest.raises(ConfigError, match=r"TRLReward: .* has no parameter completions; use FunctionReward"):
        TRLReward(lambda completion: 1.0)


def test_messages_of_trl_are_explained_and_one_of_its_functions_works_as_it_is():
    def theirs(prompts, completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    chat = [Prompt(messages=({"role": "user", "content": "1+1"},), answer="2")]
    with pytest.raises(RewardError, match=r"\(test_function\.py line \d+\) for ") as caught:
        evaluate_reward(as_reward(theirs), ["22"], chat)
    assert "indices must be integers, not 'str'; completions are texts; for messages use TRLReward(function)" in str(caught.value)
    assert evaluate_reward(as_reward(TRLReward(theirs)), ["22"], chat).total.tolist() == [2.0]


def test_functions_and_lists_of_them_are_rewards():
    def right(completions, answer, **kwargs):
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    def short(completion):
        return float(len(completion) < 3)

    prompts = [Prompt(text="1+1=", answer="2"), Prompt(text="1+9=", answer="10", index=1)]
    both = evaluate_reward(as_reward([right, short]), ["2", "100"], prompts)
    assert both.total.tolist() == [2.0, 0.0] and list(both.parts) == ["right", "short"]
    weighted = WeightedSum([right, FunctionReward(short, name="brief"), ExactMatch()], [1.0, 0.5, 0.25])
    assert evaluate_reward(weighted, ["2", "100"], prompts).total.tolist() == [1.75, 0.0]
    paths = [reward["init_args"].get("function", "")[-5:] for reward in weighted.to_config()["init_args"]["rewards"]]
    assert paths == ["right", "short", ""]
    kept = ExactMatch()
    assert as_reward(kept) is kept and as_reward(kept.__call__)(["2", "100"], prompts) == [1.0, 0.0]
    for wrong in (ExactMatch, "ExactMatch", 1.0, [right, None]):
        with pytest.raises(ConfigError, match="give a reward such as MathMatch"):
            as_reward(wrong)


def test_in_python_the_function_itself():
    reward = FunctionReward(lambda completion, bonus=0.0: len(completion) + bonus, name="length", arguments={"bonus": 0.5})
    prompts = [Prompt(text="Go", index=index) for index in range(2)]
    assert list(reward(["a", "bcd"], prompts)) == [1.5, 3.5] and reward.name == "length"
    assert reward.to_config()["init_args"]["function"].endswith("test_in_python_the_function_itself.<locals>.<lambda>")
    for arguments in ({"timeout_s": 0}, {"on_timeout": 1.0}, {"concurrency": 0}):
        with pytest.raises(ConfigError, match="FunctionReward: "):
            FunctionReward(len, **arguments)


def test_a_module_by_its_dotted_name_and_what_a_reward_says_of_itself(here, monkeypatch):
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    (here / "pack" / "parts.py").write_text("def one(completion): return 1.0")
    monkeypatch.syspath_prepend(here)
    for path in ("pack.parts.one", "pack.parts:one"):
        reward = FunctionReward(path)
        assert reward(["x"], PROMPTS[:1]) == [1.0] and reward.name == "one"
    reward = FunctionReward("my_rewards.py:brief", measures_correctness=False)
    result = evaluate_reward(WeightedSum([ExactMatch(), reward], [1.0, 0.5]), ["12", "13"], PROMPTS)
    assert result.parts["brief"].tolist() == [1.0, 1.0] and result.correct.tolist() == [True, False]


def test_asynchronous_calls_wait_together_or_in_turns(here):
    start = time.monotonic()
    assert scores("judge", ["12", "13"] * 40) == [1.0, 0.0] * 40
    assert time.monotonic() - start < 80 * 0.2, "what they would take in turns, on a busy machine too"
    assert scores("judge_batch", ["12", "13"]) == [1.0, 0.0]
    start = time.monotonic()
    assert scores("judge", ["12"] * 4, concurrency=2, timeout_s=5) == [1.0] * 4
    assert time.monotonic() - start >= 0.4


def test_all_calls_share_one_event_loop_even_within_another(here):
    async def in_a_notebook():
        return scores("with_client", ["a", "b"])

    assert scores("with_client", ["a", "b"]) == [1.0, 1.0] and asyncio.run(in_a_notebook()) == [1.0, 1.0]


@pytest.mark.parametrize("function", ["slow", "sleepy"])
def test_one_that_is_out_of_time_earns_what_was_said_or_stops_with_the_row(here, function, caplog):
    start = time.monotonic()
    assert scores(function, ["a", "slow", "b"], timeout_s=2, on_timeout=-1.0) == [1.0, -1.0, 1.0]
    assert "took more than timeout_s=2 s for rows.jsonl row 1 with completion 'slow'; it earns on_timeout=-1" in caplog.text
    with pytest.raises(RewardError, match=r"more than timeout_s=1 s for rows\.jsonl row 1 .*'slow'; raise timeout_s, or set"):
        scores(function, ["a", "slow"], timeout_s=1)
    assert scores(f"{function}_batch", ["a", "b"], timeout_s=0.2, on_timeout=0.0) == [0.0, 0.0]
    with pytest.raises(RewardError, match=r"for a batch of 2 completions, the first for rows\.jsonl row 0"):
        scores(f"{function}_batch", ["a", "b"], timeout_s=0.2)
    assert time.monotonic() - start < 25


ZERO = r"zero \(\w+\.py line {line}\) for rows\.jsonl row 1 with completion '0'"


def test_a_fault_names_the_line_and_the_row(here):
    for function, completions, message in (
        *((name, ["1", "0"], ZERO) for name in ("careless", "careless_async")),
        ("careless_batch", ["1", "0"], r"ZeroDivisionError: .* for a batch of 2 completions, the first for rows\.jsonl row 0"),
        ("nothing", ["1"], r"\(nothing\) returned None, which is not a number, for rows\.jsonl row 0 .*, 0\.0 if it does not"),
        ("leaves", ["a"], r"raised SystemExit: 2 \(\w+\.py line {line}\) for rows\.jsonl row 0"),
    ):
        line = next(number for number, text in enumerate(MINE.splitlines(), 1) if f"def {function}(" in text)
        with pytest.raises(RewardError, match=message.replace("{line}", str(line))):
            scores(function, completions, timeout_s=5.0)


def test_what_cannot_be_found_is_said_at_start(here):
    (here / "leaves.py").write_text("raise SystemExit(2)")
    (here / "needs.py").write_text("import no_such_library")
    for function, message in (
        ("no_file.py:f", "there is no file .*no_file.py"),
        ("my_rewards.py:absent", "has no function 'absent'; it has .*batch.*brief"),
        ("my_rewards.py:neither", "has the parameters text; name one of them completions"),
        ("my_rewards.py:by_place", "takes completions only by position"),
        ("my_rewards.py", r"names a file but no function in it; write my_rewards.py:function"),
        ("leaves.py:f", "importing leaves.py raised SystemExit: 2"),
        ("my_rewards.py:Limits", "is a class; .* set class_path"),
        ("needs.py:f", "needs.py needs the module 'no_such_library', which is not installed"),
        ("function", "give package.module.function or path/to/file.py:function"),
    ):
        with pytest.raises(ConfigError, match=message):
            FunctionReward(function)


def test_a_class_may_be_asynchronous_too():
    class Judge(RewardFunction):
        async def __call__(self, completions, prompts):
            return [1.0 / len(text) for text in completions]

    assert evaluate_reward(Judge(), ["a", "bc"], PROMPTS).total.tolist() == [1.0, 0.5]
    with pytest.raises(RewardError, match=r"Judge \(judge\) raised ZeroDivisionError: .* for a batch of 2 completions"):
        evaluate_reward(Judge(), ["a", ""], PROMPTS)


def test_parameters_that_are_no_columns_are_arguments(here):
    prompts = [Prompt(text="?", answer="2")] * 2
    assert FunctionReward("my_rewards.py:near")(["2.05", "2.5"], prompts) == [1.0, 0.0]
    given = FunctionReward("my_rewards.py:near", arguments={"tolerance": 1, "words": ["two"]})
    assert given(["2.05", "2.5"], prompts) == [1.0, 1.0] and given.arguments["words"] == ["two"], "each call gets its own"
    batch = FunctionReward("my_rewards.py:near_batch", arguments={"tolerance": 0.6, "unit": "km"})
    batch.check_prompt(prompts[0])
    for same in (batch, deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert same(["2.05", "2.7"], prompts) == [1.0, 0.0]
        assert same.to_config()["init_args"]["arguments"] == {"tolerance": 0.6, "unit": "km"}


def test_arguments_that_do_not_fit_are_refused(here):
    for function, arguments, message in (
        ("near", {"tolerence": 1}, r"arguments\.tolerence=1: .*:near has no such parameter .* answer, tolerance, words"),
        ("near", {"answer": "1"}, "the run itself passes answer to my_rewards.py:near"),
        ("near", {"tolerance": "wide"}, r"arguments\.tolerance='wide'; give a number, as my_rewards\.py:near expects"),
        ("near", {"tolerance": True}, "give a number, as .* expects"),
        ("near_batch", {"tolerance": "0.1"}, "give a number, as .* expects"),
    ):
        with pytest.raises(ConfigError, match=message):
            FunctionReward(f"my_rewards.py:{function}", arguments=arguments)


def test_a_missing_or_hidden_column_is_named_before_training(here):
    reward = FunctionReward("my_rewards.py:batch")
    given = FunctionReward("my_rewards.py:near", arguments={"tolerance": 0.5})
    reward.check_prompt(PROMPTS[0])
    with pytest.raises(DataError, match=r"needs 'tolerance', but x\.csv row 7 has no such column; it has a, answer, set_name"):
        reward.check_prompt(Prompt(text="?", answer="1", index=7, source="x.csv", columns={"a": 1}))
    with pytest.raises(DataError, match=r"arguments\.tolerance of .* is also a column of rows.jsonl row 0; leave it out"):
        given.check_prompt(PROMPTS[0])
