"""Right programs earn the reward for every form of tests; rows that cannot be tested are refused when the data is set up."""

import gzip
import json
import time

import pytest
from public_data import public_data

from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.rewards import CodeTests
from hybrid_lightning.rewards.code_tests import extract_program
from hybrid_lightning.types import Prompt

PREAMBLE = """
from typing import *

class ListNode:
    def __init__(self, val=0, next=None): self.val, self.next = val, next

def list_node(values):
    head = p = ListNode()
    for value in values: p.next = p = ListNode(value)
    return head.next

def is_same_list(p1, p2):
    while p1 and p2 and p1.val == p2.val: p1, p2 = p1.next, p2.next
    return p1 is None and p2 is None
"""


@pytest.fixture(scope="module")
def reward():
    return CodeTests(cpu_seconds=2)


def prompt(**columns):
    return Prompt(text="?", columns=columns, source="rows.jsonl", index=3)


def test_right_solutions_pass_and_subtly_wrong_ones_do_not(reward):
    """In the form of LeetCodeDataset."""
    reverse = "p = None\n        while head: head.next, p, head = p, head, head.next\n        return p"
    same = "is_same_list(candidate(head = list_node([1,2,3])), list_node([3,2,1])) and candidate(head = None) is None"
    deep = "return 1 + self.count(n - 1) if n else 0"
    for method, arguments, condition, *bodies in (
        ("reverseList", "head: Optional[ListNode]", same, reverse, "return head"),
        ("count", "n", "candidate(n = 20000) == 20000", deep, deep.replace("n else", "n > 1 else")),
    ):
        row = prompt(prompt=PREAMBLE, test=f"def check(candidate):\n    assert {condition}\n", entry_point=f"Solution().{method}")
        programs = [f"class Solution:\n    def {method}(self, {arguments}):\n        {body}" for body in bodies]
        assert reward([f"Here it is:\n```python\n{program}\n```\n" for program in programs], [row] * 2) == [1.0, 0.0]


HUMANEVAL = {
    "prompt": "import math\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
    'def root(xs):\n    """Find x with poly(xs, x) = 0 for xs of degree 1."""\n',
    "test": "METADATA = {}\n\ndef check(candidate):\n    import random\n    for _ in range(5):\n"
    "        xs = [random.randint(1, 9), random.randint(1, 9)]\n        assert math.fabs(poly(xs, candidate(xs))) < 1e-6\n",
    "entry_point": "root",
}


def test_humaneval(reward):
    completions = {
        "    return -xs[0] / xs[1]\n": 1.0,  # a body that continues
        "def root(xs):\n    return -xs[0] / xs[1]\n": 1.0,
        "def root(xs):\n    return xs[0] / xs[1]\n": 0.0,
        "def poly(xs, x): return 0\ndef root(xs):\n    return 0\n": 0.0,  # a helper of the tests is theirs
    }
    assert reward(list(completions), [prompt(**HUMANEVAL)] * 4) == list(completions.values())


ASSERTS = [
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
    (["try:\n    f()\n    assert False\nexcept KeyError:\n    pass\nassert f"],
     "class Missing(KeyError): pass\ndef f(): raise Missing"),
]  # fmt: skip


def test_asserts(reward):
    rows = [prompt(test=tests) for tests, _ in ASSERTS]
    assert reward([program for _, program in ASSERTS], rows) == [1.0] * len(rows)
    assert reward(["pass"] * len(rows), rows) == [0.0] * len(rows)


def test_standard_streams(reward):
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
    tests = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
    assert reward(programs, [prompt(test=tests)] * 5) == [1.0, 1.0, 1.0, 1.0, 0.0]
    others = [json.dumps(tests), [{"input": "1 2\n", "output": "3"}, {"input": "3 4", "output": "7\n"}]]
    for program, value in ((programs[0], 1.0), ("print(3)", 0.0)):
        assert reward([program] * 2, [prompt(test=other) for other in others]) == [value] * 2


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


def test_installed_packages_can_be_allowed_but_not_one_that_programs_could_not_import(tmp_path, monkeypatch):
    (tmp_path / "sorts.py").write_text("from in_order import f")
    (tmp_path / "in_order.py").write_text("f = sorted")
    monkeypatch.syspath_prepend(tmp_path)
    row, programs = prompt(test="assert f([2, 1]) == [1, 2]"), ["from in_order import f"]
    assert CodeTests()(programs, [row]) == [0.0] and CodeTests(packages=["in_order"])(programs, [row]) == [1.0]
    for name, message in (
        ("sorts", "cannot be imported.*No module named '\\w+'.*its depend"),
        ("absent", "is not installed"),
    ):
        with pytest.raises(ConfigError, match=f"'{name}' {message}"):
            CodeTests(packages=[name])


def test_set_up_code_that_fails_is_shown_and_the_order_of_a_set_is_the_same_each_time(reward, caplog):
    row = prompt(test="assert f() == 1", prompt="import no_such_module")
    assert reward(["def f(): return 1"], [row]) == [0.0]
    assert "rows.jsonl row 3: the set-up code of the tests fails: ModuleNotFoundError" in caplog.text
    row = prompt(test={"inputs": [""], "outputs": [str(list({"one", "two", "three", "four"}))]})
    assert len(set(reward(["print(list({'one', 'two', 'three', 'four'}))"] * 4, [row] * 4))) == 1


def test_the_program_in_a_completion():
    for completion, program in (
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\na\n```\n```py\nb\n```\n```text\nc\n```", "b\n"),
        ("```python\na\n```\nBetter:\n~~~Python3\nb\n~~~", "b\n"),
        ("```python\nprint('''\n``` inside''')\n```", "print('''\n"),
        ("````python\nprint('''\n```\n''')\n````", "print('''\n```\n''')\n"),
        ("```python\nprint(1)", "print(1)"),
        ("  ```python\n  a\n  ```", "  a\n"),
    ):
        assert extract_program(completion) == program


def test_a_long_line_does_not_hold_up_training():
    started = time.process_time()
    for text in ("```" + "a" * 200_000, "`" * 200_000, "```" + " " * 200_000 + "x"):
        extract_program(text)
    assert time.process_time() - started < 5


def test_a_row_without_usable_tests_is_refused(reward):
    for columns, message in (
        ({}, "'test' has neither code, nor a list of asserts"),
        ({"test": "def check(candidate:"}, "'test' is not Python code"),
        ({"test": "def check(candidate):\n    assert candidate(1)"}, "entry_point_column must name"),
        ({"test": "def check(c):\n    assert c(1)", "entry_point": "Solution("}, "'Solution\\(' is not a Python expression"),
        ({"test": "f(1)"}, "has no assert"),
        ({"test": "assert 1 == 1"}, "calls nothing that the program could define"),
        ({"test": "assert f(1)", "prompt": "Write a function f."}, "set setup_column to the column with imports"),
        ({"test": {"inputs": ["1"], "outputs": []}}, 'the same number of "inputs" and "outputs"'),
        ({"test": {"inputs": [[1]], "outputs": ["1"], "fn_name": "f"}}, "fn_name"),
        ({"test": {"inputs": [1], "outputs": ["1"]}}, "must be text"),
        ({"test": [{"input": "1"}]}, 'must have an "input" and an "output"'),
    ):
        with pytest.raises(DataError, match=rf"rows.jsonl row 3.*{message}"):
            reward.check_prompt(prompt(**columns))


def test_solutions_of_leetcode_pass():
    with gzip.open(public_data("leetcode/v0.2.0-test.jsonl.gz"), "rt") as stream:
        rows = [json.loads(line) for line in stream]
    reward = CodeTests()
    prompts = [prompt(**row) for row in rows]
    for each in prompts:
        reward.check_prompt(each)
    for first, value in ((0, 1.0), (1, 0.0)):  # solutions of the problems, and of others
        assert reward([row["response"] for row in rows[first:200:40]], prompts[:200:40]) == [value] * 5
