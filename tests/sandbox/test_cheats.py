"""Programs that cheat the tests earn nothing, in a run that gives honest ones their reward."""

import pytest
from cheats import CHEATS, TESTS, WITH_HELPERS

from hybrid_lightning.rewards import CodeTests
from hybrid_lightning.types import Prompt

HONEST = {
    "plain": "def double(x): return 2 * x",
    "a lambda": "double = lambda x: x + x",
    "with prints": "print('PASSED')\ndef double(x):\n    print(x)\n    return x * 2",
    "with a class": "class S:\n    def twice(self, x): return x * 2\ndouble = S().twice",
    "with files": "def double(x):\n    open('x', 'w').write('2')\n    return x * int(open('x').read())",
    "with the null device": "import os\ndef double(x):\n    print(x, file=open(os.devnull, 'w'))\n    return x * 2",
    "a subclass": "class N(int): pass\ndef double(x): return N(2 * x) if isinstance(x, int) else x * 2",
}
CHECK = "def check(candidate):\n    " + "\n    ".join(TESTS).replace("double(", "candidate(")
STREAM = {"inputs": ["21\n"], "outputs": ["42\n"]}
# Programs for standard streams: right output, wrong end.
STREAM_CHEATS = {
    "both answers": "print(21)\nprint(42)",
    "fails afterwards": "print(42)\nraise ValueError",
    "dies afterwards": "print(42, flush=True)\nimport ctypes; ctypes.string_at(0)",
    "never ends": "print(42, flush=True)\nwhile True: pass",
    "reads its output": "import os\nprint(os.pread(1, 100, 0).decode())",
    "prints on the wrong stream": "import sys\nprint(42, file=sys.stderr)",
    "writes elsewhere": "import os\nfor n in range(2, 64):\n    try: os.write(n, b'42')\n    except OSError: pass",
}


# Possible differences where the tests are a function that gets the candidate.
BY_CHECK = ["nothing", "wrong", "exit", "raise AssertionError", "equal to all", "patch the harness", "own check", "trace"]


def score(programs, tests, entry_point=None, partial_credit=False, wall_seconds=20.0):
    prompt = Prompt(text="Double x.", columns={"test": tests, "entry_point": entry_point})
    reward = CodeTests(cpu_seconds=1, wall_seconds=wall_seconds, memory_mb=128, partial_credit=partial_credit)
    completions = [f"```python\n{program}\n```" for program in programs.values()]
    return dict(zip(programs, reward(completions, [prompt] * len(programs)), strict=True))


@pytest.mark.long
def test_no_cheat_passes_and_honest_programs_do():
    assert score(CHEATS, TESTS, wall_seconds=2.0) == dict.fromkeys(CHEATS, 0.0) and len(CHEATS) > 50
    assert score(HONEST, TESTS) == dict.fromkeys(HONEST, 1.0)


def test_the_same_holds_for_a_function_that_checks_and_a_share_is_earned_by_what_passes():
    programs = {name: CHEATS[name] for name in BY_CHECK}
    assert score({**programs, **HONEST}, CHECK, "double") == {**dict.fromkeys(programs, 0.0), **dict.fromkeys(HONEST, 1.0)}
    programs = {name: CHEATS[name] for name in ("wrong", "right once", "right but for the last", "exit at once in the function")}
    thirds = {"wrong": 1 / 3, "right once": 1 / 3, "right but for the last": 2 / 3, "exit at once in the function": 0.0}
    for tests, entry_point in ((TESTS, None), (CHECK, "double")):
        assert score(programs, tests, entry_point, partial_credit=True) == pytest.approx(thirds)


def test_no_program_brings_what_the_tests_compare_with():
    prompts = [Prompt(text="Halve x.", columns={"test": tests, "entry_point": None}) for tests, _ in WITH_HELPERS.values()]
    rewards = CodeTests(cpu_seconds=1)([f"```python\n{program}\n```" for _, program in WITH_HELPERS.values()], prompts)
    assert dict(zip(WITH_HELPERS, rewards, strict=True)) == dict.fromkeys(WITH_HELPERS, 0.0)


BANK = """
class Account:
    def __init__(self, owner): self.owner, self.balance = owner, 0
    def deposit(self, n):
        self.balance += n
        return self
    def equals(self, other): return self.balance == other.balance
    def index(self): return 7
class Bank:
    def __init__(self): self.accounts = {}
    def open(self, owner): return self.accounts.setdefault(owner, Account(owner))
def counter():
    n = 0
    def add(k=1):
        nonlocal n
        n += k
        return n
    return add
def opened(owner): return Account(owner)
def pattern(): return __import__("re").compile("a+")
def stack(*items): return type("S", (), {"pop": lambda self: items[-1], "size": len(items)})()
"""
# Tests that ask the program's own objects, as the problem wants it.
ASKED = {
    "an object of an object": "bank = Bank()\nbank.open('A').deposit(5)\nassert bank.open('A').balance == 5",
    "equal by the class under test": "bank = Bank()\nassert bank.open('A').deposit(5).equals(bank.open('B').deposit(5))",
    "a method named like one of data": "assert Bank().open('A').index() == 7",
    "a closure": "add = counter()\nadd()\nassert add(4) == 5",
    "what a function makes": "account = opened('A')\naccount.deposit(3)\nassert account.balance == 3 and account.owner == 'A'",
    "a container that a function makes": "assert stack(1, 2).pop() == 2 and stack(1).size == 1",
    "a pattern": "assert pattern().fullmatch('aaa') and not pattern().match('b')",
}


def test_objects_that_the_problem_asks_for_may_speak_for_themselves():
    tests = list(ASKED.values())
    wrong = BANK.replace("+= n", "+= n + 1").replace("+= k", "+= 2").replace("items[-1]", "items[0]")
    assert score({"honest": BANK, "wrong": wrong}, tests, partial_credit=True) == {"honest": 1.0, "wrong": pytest.approx(3 / 7)}


def test_streams_are_compared_outside_of_the_sandbox():
    rewards = score({**STREAM_CHEATS, "honest": "print(2 * int(input()))"}, STREAM)
    assert rewards.pop("honest") == 1.0
    assert not any(rewards.values()), rewards
