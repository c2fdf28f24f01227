"""Problems in the form of LeetCodeDataset, each with a right and a subtly wrong solution."""

PREAMBLE = """
from typing import *
from functools import *
from collections import *
from itertools import *
from heapq import *
from bisect import *
from math import *
inf = float('inf')

class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def list_node(values: list):
    head = p = ListNode()
    for value in values:
        p.next = ListNode(value)
        p = p.next
    return head.next

def is_same_list(p1, p2):
    while p1 and p2:
        if p1.val != p2.val:
            return False
        p1, p2 = p1.next, p2.next
    return p1 is None and p2 is None
"""


def _problem(method, cases, right, wrong):
    """Cases are what `candidate(...)` gets and equals, or whole conditions."""
    lines = [f"    assert {case if isinstance(case, str) else f'candidate({case[0]}) == {case[1]}'}" for case in cases]
    solution = "class Solution:\n    def {}(self, {}):\n{}".format
    arguments, right_body = right
    return {
        "test": "def check(candidate):\n" + "\n".join(lines) + "\n",
        "entry_point": f"Solution().{method}",
        "right": solution(method, arguments, right_body),
        "wrong": solution(method, arguments, wrong),
    }


LEETCODE = {
    "reverse a list": _problem(
        "reverseList",
        ["is_same_list(candidate(head = list_node([1,2,3])), list_node([3,2,1]))", "candidate(head = None) is None"],
        ("head: Optional[ListNode]", "        p = None\n"
         "        while head: head.next, p, head = p, head, head.next\n        return p"),
        "        return head",
    ),
    "groups": _problem(
        "groupAnagrams",
        ["sorted(map(sorted, candidate(strs = ['ab', 'ba', 'c']))) == [['ab', 'ba'], ['c']]"],
        ("strs", "        groups = defaultdict(list)\n        for s in strs: groups[tuple(sorted(s))].append(s)\n"
         "        return groups.values()"),
        "        groups = defaultdict(list)\n        for s in strs: groups[s[0]].append(s)\n        return groups.values()",
    ),
    "transpose": _problem(
        "transpose",
        [("matrix = [[1,2],[3,4]]", "[[1,3],[2,4]]")],
        ("matrix", "        return [list(row) for row in zip(*matrix)]"),
        "        return list(zip(*matrix))",
    ),
    "deep recursion": _problem(
        "count",
        [("n = 20000", "20000")],
        ("n", "        return 1 + self.count(n - 1) if n else 0"),
        "        return 1 + self.count(n - 1) if n > 1 else 0",
    ),
    "large values": _problem(
        "power",
        [("n = 3000", "2 ** 3000"), ("n = 0", "1")],
        ("n: int", "        return 1 << n"),
        "        return 2.0 ** n if n < 1000 else (1 << n) - 1",
    ),
    "a float": _problem(
        "average",
        ["abs(candidate(xs = [1, 2]) - 1.5) < 1e-5", "candidate(xs = []) == inf"],
        ("xs", "        return sum(xs) / len(xs) if xs else inf"),
        "        return sum(xs) / len(xs) if xs else nan",
    ),
}  # fmt: skip
