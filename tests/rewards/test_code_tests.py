"""Right programs earn the reward for every form of tests; rows that cannot be tested are refused when the data is set up."""

import gzip
import json
import time

import pytest
from code_problems import LEETCODE, PREAMBLE
from public_data import public_data

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.rewards import CodeTests
from hybrid_lightning.rewards.code_tests import extract_program
from hybrid_lightning.types import Prompt


@pytest.fixture(scope="module")
def reward():
    return CodeTests(cpu_seconds=2)


def prompt(**columns):
    return Prompt(text="?", columns=columns, source="rows.jsonl", index=3)


def test_right_solutions_pass_and_subtly_wrong_ones_do_not(reward):
    prompts, completions, expected = [], [], []
    for problem in LEETCODE.values():
        row = prompt(prompt=PREAMBLE, test=problem["test"], entry_point=problem["entry_point"])
        for kind, value in (("right", 1.0), ("wrong", 0.0)):
            prompts.append(row)
            completions.append(f"Here it is:\n```python\n{problem[kind]}\n```\n")
            expected.append(value)
    got = reward(completions, prompts)
    names = [f"{kind} {name}" for name in LEETCODE for kind in ("right", "wrong")]
    assert dict(zip(names, got, strict=True)) == dict(zip(names, expected, strict=True))


HUMANEVAL = {
    "prompt": "import math\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
    'def root(xs):\n    """Find x with poly(xs, x) = 0 for xs of degree 1."""\n',
    "test": "METADATA = {}\n\ndef check(candidate):\n    import random\n    for _ in range(5):\n"
    "        xs = [random.randint(1, 9), random.randint(1, 9)]\n        assert math.fabs(poly(xs, candidate(xs))) < 1e-6\n",
    "entry_point": "root",
}


def test_humaneval(reward):
    completions = {
        "    return -xs[0] / xs[1]\n": 1.0,  # a body that goes on
        "def root(xs):\n    return -xs[0] / xs[1]\n": 1.0,
        "def root(xs):\n    return xs[0] / xs[1]\n": 0.0,
        "def poly(xs, x): return 0\ndef root(xs):\n    return 0\n": 0.0,  # a helper of the tests is theirs
    }
    assert reward(list(completions), [prompt(**HUMANEVAL)] * 4) == list(completions.values())


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        (["assert f(2) == 4", "assert f([1]) == [1, 1]"], "def f(x): return 2 * x"),
        ("assert f(2) == 4\nassert f(3) == 6", "def f(x): return 2 * x"),
        (["assert longest([Pair(5, 24), Pair(1, 9)]) == 19"], "class Pair:\n    def __init__(self, a, b): self.w = b - a\n"
         "def longest(pairs): return max(p.w for p in pairs)"),
        (["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"],
         "def sum(a, b):\n    return [6, 93][a > 10]"),  # named like a builtin, as one of MBPP is
        (["assert math.isclose(half(3), 1.5)"], "def half(x): return x / 2"),
        (["x = [3, 1, 2]\norder(x)\nassert x == [1, 2, 3]"], "def order(x): x.sort()"),
        (["try:\n    root(-1)\n    assert False\nexcept ValueError:\n    assert True"],
         "def root(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5"),
        ("from solution import f\n\ndef test_two():\n    assert f(2) == 4\n\ndef test_three():\n    assert f(3) == 6\n",
         "def f(x): return 2 * x"),
        (["assert to_int('3') == 3"], "to_int = int"),
        (["try:\n    f()\n    assert False\nexcept KeyError:\n    pass\nassert f"],
         "class Missing(KeyError): pass\ndef f(): raise Missing"),
    ],
)  # fmt: skip
def test_asserts(reward, tests, program):
    assert reward([program, "pass"], [prompt(test=tests)] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]},
        [{"input": "1 2\n", "output": "3"}, {"input": "3 4", "output": "7\n"}],
        json.dumps({"inputs": ["1 2"], "outputs": ["3"]}),
    ],
)
def test_standard_streams(reward, tests):
    programs = [
        "print(sum(map(int, input().split())))",
        "import sys\nif __name__ == '__main__':\n"
        "    a, b = map(int, sys.stdin.read().split())\n    print(a + b, ' ')\n    sys.exit()",
        "import threading\nthreading.stack_size(2**26)\n"
        "threading.Thread(target=lambda: print(sum(map(int, open(0).read().split())))).start()",
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, (2**28, 2**28))\nsys.setrecursionlimit(10**6)\n"
        "from concurrent.futures import ThreadPoolExecutor\nimport time\n"
        "with ThreadPoolExecutor(16) as pool: list(pool.map(lambda n: time.sleep(0.01), range(32)))\n"
        "print(sum(map(int, input().split())))\nexit()",
        "print(3)\nprint()\nprint(3)",
    ]
    assert reward(programs, [prompt(test=tests)] * 5) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_class_that_the_set_up_code_leaves_unfinished_is_the_programs(reward):
    skeleton = 'class Counter:\n    def add(self, n):\n        """Add n."""\n'
    row = {"prompt": skeleton, "entry_point": "Counter"}
    by_check = prompt(test="def check(make):\n    c = make()\n    c.add(2)\n    assert c.add(3) == 5", **row)
    by_name = prompt(test="c = Counter()\nc.add(2)\nassert c.add(3) == 5", **row)
    right = "class Counter:\n    n = 0\n    def add(self, n):\n        self.n += n\n        return self.n"
    assert reward([right, right, right.replace("+=", "=")], [by_check, by_name, by_name]) == [1.0, 1.0, 0.0]


def test_a_result_is_judged_by_the_set_up_codes_methods(reward):
    """Whatever the program hangs onto an object of that class."""
    same = "class Node:\n    def __init__(self, n): self.n = n\n    def same(self, other): return self.n == other.n"
    row = prompt(prompt=same, test="def check(f):\n    assert f(3).same(Node(6))", entry_point="f")
    right = "def f(x): return Node(2 * x)"
    cheat = "def f(x):\n    node = Node(x)\n    node.same = {}\n    return node"
    changed = "class Node:\n    def same(self, other): return True\ndef f(x):\n    node = Node()\n    node.n = x\n    return node"
    rewards = reward([right, cheat.format("bool"), cheat.format("lambda other: True"), changed], [row] * 4)
    assert rewards == [1.0, 0.0, 0.0, 0.0]


def test_the_share_that_passes_can_be_the_reward_and_a_pattern_takes_the_program_out():
    share = CodeTests(partial_credit=True)
    row = prompt(test={"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "3", "0"]})
    assert share(["print(input())", "print(1)", ""], [row] * 3) == [0.75, 0.25, 0.0]
    reward = CodeTests(pattern=r"<code>(.*?)</code>")
    completions = ["<code>def f(): return 1</code> so", "```python\ndef f(): return 1\n```", "<code> </code>"]
    assert reward(completions, [prompt(test="assert f() == 1")] * 3) == [1.0, 0.0, 0.0]


def test_installed_packages_can_be_allowed():
    program = "from sortedcontainers import SortedList\ndef f(x): return list(SortedList(x))"
    row = prompt(test="assert f([2, 1]) == [1, 2]")
    pytest.importorskip("sortedcontainers")
    assert CodeTests()([program], [row]) == [0.0] and CodeTests(packages=["sortedcontainers"])([program], [row]) == [1.0]
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        CodeTests(packages=["no_such_package"])


def test_a_package_that_programs_cannot_import_is_refused(tmp_path, monkeypatch):
    """Instead of paying nothing to every program that imports it."""
    (tmp_path / "lent.py").write_text("import needed_by_it")
    (tmp_path / "needed_by_it.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'lent' cannot be imported.*No module named '\w+'.*what it needs itself too"):
        CodeTests(packages=["lent"])


def test_set_up_code_that_fails_is_shown_and_the_order_of_a_set_is_the_same_each_time(reward, caplog):
    row = prompt(test="assert f() == 1", prompt="import no_such_module")
    assert reward(["def f(): return 1"], [row]) == [0.0]
    assert "rows.jsonl row 3: the set-up code of the tests fails: ModuleNotFoundError" in caplog.text
    row = prompt(test={"inputs": [""], "outputs": [str(list({"one", "two", "three", "four"}))]})
    got = reward(["print(list({'one', 'two', 'three', 'four'}))"] * 4, [row] * 4)
    assert len(set(got)) == 1


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\na\n```\n```py\nb\n```\n```text\nc\n```", "b\n"),
        ("```python\na\n```\nBetter:\n~~~Python3\nb\n~~~", "b\n"),
        ("```\na\n```\nthen\n```\nb\n```", "b\n"),
        ("```python\nprint('''\n``` inside''')\n```", "print('''\n"),
        ("````python\nprint('''\n```\n''')\n````", "print('''\n```\n''')\n"),
        ("```python\nprint(1)", "print(1)"),
        ("  ```python\n  a\n  ```", "  a\n"),
    ],
)
def test_the_program_in_a_completion(completion, program):
    assert extract_program(completion) == program


def test_a_long_line_does_not_hold_up_training():
    started = time.monotonic()
    for text in ("```" + "a" * 200_000, "`" * 200_000, "```" + " " * 200_000 + "x"):
        extract_program(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "'test' is missing or empty"),
        ({"test": [1]}, "but a list"),
        ({"test": "def check(candidate:"}, "'test' is no Python code"),
        ({"test": "def check(candidate):\n    assert candidate(1)"}, "entry_point_column must name"),
        ({"test": "def check(c):\n    assert c(1)", "entry_point": "Solution("}, "'entry_point': 'Solution\\(' is no expression"),
        ({"test": "f(1)"}, "has no assert"),
        ({"test": "assert 1 == 1"}, "calls nothing that the program could define"),
        ({"test": "assert f(1)", "prompt": "Write a function f."}, "set setup_column to the column with imports"),
        ({"test": "assert f(1)", "prompt": 7}, "holds a int, not code"),
        ({"test": {"inputs": ["1"], "outputs": []}}, 'as many "inputs" as "outputs"'),
        ({"test": {"inputs": [[1]], "outputs": ["1"], "fn_name": "f"}}, "fn_name"),
        ({"test": {"inputs": [1], "outputs": ["1"]}}, "must be text"),
        ({"test": [{"input": "1"}]}, 'must have an "input" and an "output"'),
    ],
)
def test_a_row_without_usable_tests_is_refused(reward, columns, message):
    with pytest.raises(DataError, match=rf"rows.jsonl row 3.*{message}"):
        reward.check_prompt(prompt(**columns))


def test_solutions_of_leetcode_pass():
    with gzip.open(public_data("leetcode/v0.2.0-test.jsonl.gz"), "rt") as stream:
        rows = [json.loads(line) for line in stream]
    reward = CodeTests()
    prompts = [prompt(**row) for row in rows]
    for each in prompts:
        reward.check_prompt(each)
    some = slice(0, None, 20)
    assert reward([row["response"] for row in rows[some]], prompts[some]) == [1.0] * 10
    others = [row["response"] for row in rows[1::20]]  # solutions of other problems
    assert reward(others, prompts[some]) == [0.0] * 10
