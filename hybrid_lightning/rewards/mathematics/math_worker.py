"""A process that compares mathematical answers by the library math-verify; `MathVerifier` starts it as a script.

It reads one request a line, JSON: `[gold]` asks whether the gold answer is one that can be compared with, `[gold, text]` whether
the answer in the text equals it, and it writes `true` or `false`; `{"value": text}` asks for the answer in the text itself. A
request that uses more than the CPU time given as argument ends the process by the default action of SIGPROF, which nothing in
sympy can delay or catch.

It stands apart from the package so that it starts in a third of a second: it imports nothing of ours but `math_text.py`
and `math_units.py`, which import nothing else of ours.
"""

import json
import logging
import re
import resource
import signal
import sys
from functools import lru_cache
from math import isclose, isfinite
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from sympy import Eq

sys.path.append(str(Path(__file__).parent))  # at the end: what lies here hides no module of another name
from math_text import (  # type: ignore[import-not-found]
    HEDGE,
    UNCLEAR,
    is_bound,
    normalize,
    out_of_brackets,
    plain,
    statement,
    symbols,
    window,
    without_remark,
)
from math_units import in_one_unit, is_unit, ratio, scales, unit, without_unit  # type: ignore[import-not-found]

MEMORY_BYTES = 4 * 2**30  # 9^9^9 and its like are refused memory before they take the machine's

NUMBER = re.compile(
    r"""[-+]?\s*[$€£¥]?\s*[-+]?
    (?:\d{1,3}(?:[, ]\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?   # 1,234 or 1 234 or 1234, then .5 or /2
    \s*%?(?:\s[A-Za-z][A-Za-z ]*)?                            # percent, and a unit in words
    """,
    re.VERBOSE,
)
TUPLE = re.compile(
    r"(?<![\w$\\({\[])[(\[]\s*(?:NUMBER)(?:\s*,\s*(?:NUMBER))+\s*[)\]]".replace("NUMBER", r"-?\d+(?:\.\d+)?(?:/\d+)?")
)
LATEX = re.compile(r"[$]|\\[(\[]|\\[A-Za-z]")
BASE = re.compile(r"\d_\{?(\d+)\}?")  # 2516_8
HALF_DAY = re.compile(r"\d\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?([ap])\.?\s?m\b", re.IGNORECASE)  # 6:00 a.m.
PERCENT = re.compile(r"\\?%")
SMALL = 1e-3  # of a smaller number, six places say little or nothing
WORDS = re.compile(r"\$?\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*[A-Za-z][^{}]*)\}\$?")
TEXT = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*\\?\$?(-?\d[\d.,]*)\s+(?!(?:or|and|to|but|at)\b)[A-Za-z ]+\}"
)  # \text{18 dollars}
BOXES = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
DATE = re.compile(r"\d{4}-\d\d?-\d\d?")  # no subtraction


def said(completion: str) -> str:
    """The part of a completion that its answer stands in, without a remark behind it."""
    return str(without_remark(out_of_brackets(window(symbols(completion)), is_unit)))


def find(text: str) -> Any:
    """Parse the answer in what `said` leaves of a completion; an empty list if it has none."""
    if is_bound(text):
        return []
    text = TEXT.sub(r"\1", normalize(text))
    formula = statement(text)
    if formula and (parsed := parse(formula, parsing_timeout=None)):
        return parsed
    if r"\boxed" not in text and HEDGE.search(text):
        return []
    # A point or an interval is LaTeX to math-verify, which would take the last number in it.
    return parse(text if LATEX.search(text) else TUPLE.sub(r"$\g<0>$", text), parsing_timeout=None)


def same_words(gold: str, text: str) -> bool:
    r"""Whether the reference answer is words, as in \text{June 20}, and all boxes of a text say these, or else its end."""
    words = WORDS.fullmatch(gold.strip())
    said = BOXES.findall(text) or re.split(r"answer(?:\s+is\b|\s*:)", text, flags=re.IGNORECASE)[-1:]
    return words is not None and {_words(part) for part in said} == {_words(words[1])}


def _words(text: str) -> str:
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mbox)(?![a-z])|\\[ ,]|[{}~,:*$]", " ", text)
    return " ".join(text.casefold().split()).rstrip(". ")


def same_base(gold: str, text: str) -> bool:
    """Whether the last number of a text has the base of the reference answer, where both say one."""
    wanted, found = BASE.findall(gold), BASE.findall(text)
    return not wanted or not found or wanted[-1] == found[-1]


def same_half_day(gold: str, text: str) -> bool:
    """Whether the last time of a text is before noon as the reference answer is, where both say so."""
    wanted, found = HALF_DAY.findall(gold), HALF_DAY.findall(text)
    return not wanted or not found or wanted[-1].lower() == found[-1].lower()


def same_brackets(gold: str, found: str) -> bool:
    """Whether neither is a set in braces while the other is a point or an interval, which math-verify takes for a set."""
    return not any(
        one.startswith(r"\{") and re.match(r"(?:\\left)?\s*[(\[].*,", other) for one, other in ((gold, found), (found, gold))
    )


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> Any:
    """Parse a reference answer: a number, perhaps with a unit, or else a formula; None if it is neither."""
    if UNCLEAR.search(gold):
        return None
    gold = in_one_unit(gold_text(gold), ratio)[0]
    text = normalize(without_unit(plain(gold)) or gold)
    if DATE.search(text):
        return None
    if not re.search(r"\\boxed|\\\(|\\\[|\$.*\$", text) and not (NUMBER.fullmatch(text) and re.search(r"\d", text)):
        formula = re.sub(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^}]*\}", "", text)
        if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", formula):
            return None  # words, which LaTeX would read as products of letters
        text = f"${text}$"
    parsed = parse(text, parsing_timeout=None)
    return parsed if parsed and not isinstance(parsed[0], str) else None


def gold_text(gold: str) -> str:
    """A reference answer in ASCII and LaTeX, its unit without brackets: "9 (apples)" is 9."""
    return str(out_of_brackets(symbols(gold.strip()), is_unit, alone=True))


def answer(request: list[str]) -> bool:
    """Answer one request."""
    gold = parse_gold(request[0])
    if gold is None:
        return False
    if len(request) == 1:
        return bool(verify(gold, gold, timeout_seconds=None))
    if same_words(*request):
        return True
    if not same_base(*request) or not same_half_day(*request):
        return False
    # A reference answer without a unit may be in either.
    return any(answers(request[0], text, gold) for text in dict.fromkeys(in_one_unit(said(request[1]), ratio)))


def answers(reference: str, text: str, gold: Any) -> bool:
    """Whether the answer in what `said` leaves of a completion equals the reference answer, parsed and as it stands."""
    if number(gold[0]) is not None:  # 5m + 3s has letters and no units
        wanted, given = plain(in_one_unit(gold_text(reference), ratio)[0]), plain(text)
        factors = scales(wanted, given)
        if unit(wanted) is not None and not is_bound(text):
            text = without_unit(given) or text
        if 1.0 not in factors:
            return any(converts(gold, find(text), factor) for factor in factors)
    found = find(text)
    if equal(gold, found) or equal(gold, last_equation(found, text)):
        return True
    # 12.5% is 12.5 where one of the two leaves the sign out, as math-verify has it for whole numbers.
    if ("%" in reference) == ("%" in text):
        return False
    gold = parse_gold(PERCENT.sub("", reference))
    return gold is not None and equal(gold, find(PERCENT.sub("", text)))


def equal(gold: Any, found: Any) -> bool:
    """Whether two parsed answers are equal, small numbers in what they begin with and not just in six places."""
    if not same_brackets(str(gold[-1]), str(found[-1]) if found else ""):
        return False
    if not verify(gold, in_order(found), allow_set_relation_comp=True, timeout_seconds=None):
        return False
    wanted, given = number(gold[0]), number(found[0])
    if wanted is None or given is None or not 0 < abs(wanted) < SMALL:
        return True
    return any(abs(given * scale - wanted) <= 0.01 * abs(wanted) for scale in (1, 0.01, 100))  # percent


def equations(found: Any) -> list[Eq]:
    """The equations of a parsed answer that has several, with a left side of its own each, as they were written; else none."""
    parts = list(getattr(found[0], "_unsorted_args", [])) if found else []
    if all(isinstance(part, Eq) for part in parts) and len({part.lhs for part in parts}) == len(parts) > 1:
        return parts
    return []


def in_order(found: Any) -> Any:
    """A parsed answer such as "y = 3 and x = 2" in the order of a point's coordinates, which math-verify compares it with."""
    parts = equations(found)
    names = {str(part.lhs) for part in parts}
    if not parts or not (names <= set("xyz") or names <= set("abcd")):
        return found
    return [type(found[0])(*sorted(parts, key=lambda part: str(part.lhs))), *found[1:]]


def last_equation(found: Any, text: str) -> Any:
    """The last of several equations of a text without a box, such as "x = 2 and y = 3" where y is asked for; else nothing."""
    parts = equations(found)
    if (
        not parts
        or r"\boxed" in text
        or re.search(r"\bor\b", text.rsplit("\n", 1)[-1])
        or any("_" in str(part.lhs) for part in parts)
    ):
        return []  # "x_1 = 2 and x_2 = 3" are two answers
    return [parts[-1].rhs, str(parts[-1].rhs)]


def converts(gold: Any, found: Any, factor: float) -> bool:
    """Whether a parsed answer times a factor is the reference answer, which is in another unit: 90 minutes are 1.5 hours."""
    wanted, given = (number(parsed[0]) if parsed else None for parsed in (gold, found))
    return wanted is not None and given is not None and isclose(given * factor, wanted, rel_tol=1e-6)


def number(parsed: Any) -> float | None:
    """A parsed answer as a finite number; None if it is none."""
    if isinstance(parsed, Eq) and parsed.lhs.is_Symbol:  # x = 5, which is compared as 5
        parsed = parsed.rhs
    try:
        result = float(parsed.evalf().doit())  # a percentage stays a product, whose factors evalf alone leaves apart
    except (AttributeError, TypeError, ValueError, OverflowError):  # a formula
        return None
    return result if isfinite(result) else None


def value(text: str) -> str | None:
    """The answer in a text, numbers to the six places that they are compared to; None if there is none."""
    parsed = find(in_one_unit(said(text), ratio)[0])
    if not parsed:
        return None
    found = number(parsed[0])
    if found is not None:
        return f"{round(found, 6) + 0.0:.6f}" if abs(found) >= SMALL or not found else f"{found:.2e}"
    found = parsed[0]
    return str(found.rhs if isinstance(found, Eq) and found.lhs.is_Symbol else found)


def main() -> None:
    """Serve until standard input ends."""
    cpu_seconds = float(sys.argv[1])
    logging.disable(logging.CRITICAL)
    for stop in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer, which still has to score what it finishes
        signal.signal(stop, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the address space is no measure of memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    replies = sys.stdout
    sys.stdout = sys.stderr
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        request = json.loads(line)
        result = value(request["value"]) if isinstance(request, dict) else answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=replies, flush=True)


if __name__ == "__main__":
    main()
