"""Runs the hostile programs of `escapes.py`; as a script, for another user and another Python than the tests' own."""

import json
import os
import string
import sys
import textwrap
from pathlib import Path

from hybrid_lightning.sandbox.launch import Box, Limits, launch
from hybrid_lightning.sandbox.programs import CallTests, Settings, find_packages

_EACH = """
import json, os
for name, body in json.loads(ATTEMPTS).items():
    try:
        exec(body, {})
    except BaseException:
        print(json.dumps([name, "held"]), flush=True)
    else:
        print(json.dumps([name, "escaped"]), flush=True)
"""


def whole(body):
    """A program that reports whether it got out."""
    held, escaped = ("    print('held')", "    print('escaped')")
    return f"try:\n{textwrap.indent(body, '    ')}\nexcept BaseException as error:\n{held}\nelse:\n{escaped}"


def in_one(attempts, names):
    """One program of many attempts."""
    filled = {name: string.Template(body).safe_substitute(names) for name, body in attempts.items()}
    return f"ATTEMPTS = {json.dumps(filled)!r}\n{_EACH}"


def lend(site):
    """Install two packages into a folder, where programs may import the first only; returns the path."""
    for name in ("lent", "not_lent"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("def double(x): return 2 * x")
    return site / "lent"


def results(source, mechanisms, packages=()):
    """Name of an attempt -> "held" or "escaped"."""
    ran = launch([Box("script", {"setup": "", "source": source})], mechanisms, Limits(wall_seconds=30.0), packages)
    assert ran.in_time and not any(ran.endings.values()), ran
    lines = [json.loads(line) for line in ran.stdout.decode().splitlines()]
    assert len(lines) == len(dict(lines)), "a program went on twice"
    return dict(lines)


def main():
    """Arguments: mechanisms, a folder that anyone may write, and the folder that holds it and all else of this test."""
    import escapes

    mechanisms, folder, above = sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3])
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    packages = find_packages(["lent"])
    names = {"secret": secret, "folder": folder, "home": Path.home(), "socket": folder / "socket", "above": above}
    names |= {"pid": os.getpid(), "victim": os.getppid(), "port": 9, "package": packages[0]}
    attempts = {**escapes.FILES, **escapes.PACKAGES, **escapes.NETWORK, **escapes.PROCESSES}
    if os.uname().machine == "x86_64":
        attempts |= escapes.SYSTEM_CALLS
    held = results(in_one(attempts, names), mechanisms, packages)
    assert held.keys() == attempts.keys()
    escaped = [name for name, said in held.items() if said != "held"]
    assert secret.read_text() == "secret"
    settings = Settings(tuple(mechanisms), packages=packages)
    for program, passed in (
        ("def double(x): return 2 * x", 1),
        ("def double(x): return x", 0),
        ("from lent import double", 1),
        ("import statistics, decimal\nfrom lent import double", 1),  # of the standard library, read in the sandbox
    ):
        outcome = CallTests(("assert double(21) == 42",), names=("double",)).run(program, settings)
        assert outcome.passed == passed, outcome
    print(escaped or "all held")


if __name__ == "__main__":
    main()
