"""Measures how many programs the sandbox runs per minute, right and wrong ones: `python -m benchmarks.speed.sandbox`."""

import os
import time

from benchmarks.commands import command
from hybrid_lightning.rewards import CodeTests
from hybrid_lightning.types import Prompt

PROGRAM = "class Solution:\n    def double(self, x):\n        {}\n"
RIGHT, WRONG = (PROGRAM.format(body) for body in ("return 2 * x", "return x"))


def main() -> None:
    parser = command("speed.sandbox", __doc__)
    parser.add_argument("--programs", type=int, default=400)
    arguments = parser.parse_args()
    setup = "from typing import *\nfrom collections import *\nfrom math import *\n"
    tests = "def check(candidate):\n" + "".join(f"    assert candidate(x = {x}) == {2 * x}\n" for x in range(100))
    prompt = Prompt(text="?", columns={"prompt": setup, "test": tests, "entry_point": "Solution().double"})
    reward, half = CodeTests(cpu_seconds=1), arguments.programs // 2
    programs = [RIGHT, WRONG] * half
    reward(programs[:4], [prompt] * 4)
    started, used = time.perf_counter(), sum(os.times()[:4])  # of processors, including ended processes
    values = reward(programs, [prompt] * len(programs))
    seconds, used = time.perf_counter() - started, sum(os.times()[:4]) - used
    assert sum(values) == half, values
    rate, each = 60 * len(programs) / seconds, 1000 * used / len(programs)
    told = f"{len(programs)} programs of 100 asserts, {reward.workers} workers, {os.cpu_count()} cores"
    print(f"{told}: {seconds:.1f} s, {rate:.0f} a minute, {each:.0f} ms of processor time each")


if __name__ == "__main__":
    main()
