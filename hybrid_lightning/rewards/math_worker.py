"""A process that compares mathematical answers by the library math-verify; `MathVerifier` starts it as a script.

It reads one request a line, JSON: `[gold]` asks whether the gold answer is one that can be compared with, `[gold, text]` whether
the answer in the text equals it, and it writes `true` or `false`; `{"value": text}` asks for the answer in the text itself. A
request that uses more than the CPU time given as argument ends the process by the default action of SIGPROF, which nothing in
sympy can delay or catch.

It stands apart from the package (imports nothing of ours) so that it starts in a third of a second.
"""

import json
import logging
import re
import resource
import signal
import sys
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from typing import Any

from math_verify import parse, verify
from sympy import Eq

MEMORY_BYTES = 4 * 2**30  # 9^9^9 and its like are refused memory before they take the machine's

NUMBER = re.compile(
    r"""[-+]?\s*[$€£¥]?\s*[-+]?
    (?:\d{1,3}(?:[, ]\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?   # 1,234 or 1 234 or 1234, then .5 or /2
    \s*%?(?:\s[A-Za-z][A-Za-z ]*)?                            # percent, and a unit in words
    """,
    re.VERBOSE,
)
LARGE = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s*(thousand|million|billion|trillion)\b", re.IGNORECASE)
ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MIXED = re.compile(r"(?<![\w./,$}])(\d+) (\d+)/(\d+)(?![\w/])")  # 1 1/2
MIXED_PERCENT = re.compile(r"(?<![\w}.])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}(?=\s*\\?%)")  # 33\frac{1}{3}\%
REPEATING = re.compile(r"(?<![\w.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")  # 0.1\overline{6}
TUPLE = re.compile(
    r"(?<![\w$\\({\[])[(\[]\s*(?:NUMBER)(?:\s*,\s*(?:NUMBER))+\s*[)\]]".replace("NUMBER", r"-?\d+(?:\.\d+)?(?:/\d+)?")
)
LATEX = re.compile(r"[$]|\\[(\[]|\\[A-Za-z]")
BASE = re.compile(r"\d_\{?(\d+)\}?")  # 2516_8
WORDS = re.compile(r"\$?\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*[A-Za-z][^{}]*)\}\$?")
BOXES = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
DATE = re.compile(r"\d{4}-\d\d?-\d\d?")  # no subtraction
REWRITES = [
    (re.compile("[\u2212\u2012\u2013\ufe63\uff0d]"), "-"),  # minus sign, dashes
    (re.compile("(?<=\\d)\\s*[\u00d7\u00b7]\\s*(?=\\d)"), "*"),  # times
    (re.compile('[`"\u201c\u201d\u2248#]|</?[A-Za-z]+>|~(?=\\d)'), " "),  # `5`, "5", ####5, <answer>5</answer>, ~5
    (re.compile(r"(?<![\w)}])\((-?[\d.]+)\)"), r" \1 "),  # (5)
    (re.compile(r"(?<![\w.)}])\+(?=\d)"), ""),  # +5
    (re.compile(r"(?:\A|(?<=[=:]))\s*-\s+(?=\d)"), " -"),  # = - 5; elsewhere the line begins a list
    (re.compile(r"(?<![\w$])-\s*[$€£¥](?=[\d,.]+(?:\s|$))"), "-"),  # -$5
    (re.compile(r"(?<=\d)[eE]([-+]?\d+)(?![\w.])"), r"*10^(\1)"),  # 1e5
    (re.compile(r"(?<=\d):(?=\d)"), "/"),  # 2:3
    (re.compile(r"(?<=\d)(?:[_']|\{,\}|\\,)(?=\d{3}(?!\d))"), ""),  # 1_000, 1'000, 1{,}000, 1\,000
    (
        re.compile(r"(?<=\d)[ ,](?=\d{4})|(?<=,\d{3}),(?=\d\d?(?!\d))"),
        ", ",
    ),  # 1,2345 is two numbers, or a typing error, and not 1,234 and a 5
    (re.compile(r"(?<![\d.])\d+(?:\.\d+){2,}"), "x"),  # 1.000.000 or 1.2.3 is neither 1.000 nor 1.2
    (re.compile(r"(?<=[A-Za-z]):(?=[-$\d\\])"), ": "),  # Answer:5
    (re.compile(r"(?<=\d) : (?=\d)"), "/"),  # 2 : 3
    (re.compile(r"\+\s*(?=\\infty)"), ""),
    (re.compile(r"(?<![A-Za-z\\])[A-Za-z]\s*\\in\s*(?=[(\[]|\\left|\\\{)"), ""),  # x \in (1, 2)
    (re.compile(r"\\(?:mathbf|boldsymbol|bf)\s*\{(\w*)\}"), r"\1"),
    (re.compile(r"\\fbox(?=\s*\{)"), r"\\boxed"),
    # \boxed{\textbf{(B)}\ 27}: the value is the answer, and not the letter that it has among the choices
    (
        re.compile(
            r"(?<=\\boxed\{)\s*(?:\\(?:text|textbf|mathrm|mathbf|rm)\s*\{\s*)?\([A-J]\)"
            r"[\s}]*(?:\\[ ,;:!]|\\q?quad|[~:\s])*(?=[^\s}])"
        ),
        "",
    ),
    (re.compile(r"(?<=\d)\.(?=\s*\}\s*(?:\$|\\[)\]]|\Z|[.,\s]))"), ""),  # \boxed{5.}
    (re.compile(r"\\\$\s*(?=[\d.])"), ""),  # \$5
    # 5 \text{ m/s}, 5 m/s, 5 cm^2, 5 \frac{\text{m}}{\text{s}}, 73 \pmod{100}
    (re.compile(r"(?<=[\d}])(?:\\[ ,;:!]|[~\s])*\\(?:text|mathrm|mbox)\s*\{[ A-Za-z.]*/[ A-Za-z.]*\}(?=\s*[}$]|\s*\\[)\]])"), ""),
    (re.compile(r"(?<=\d)\s+(?:[A-Za-z]+/[A-Za-z]+|[A-Za-z]{2,}\^\{?[23]\}?)(?=\s*\})"), ""),
    (
        re.compile(r"(?<=[\d}])(?:\\[ ,;:!]|[~\s])*\\frac\{\\(?:text|mathrm)\{[ A-Za-z]+\}\}\{\\(?:text|mathrm)\{[ A-Za-z]+\}\}"),
        "",
    ),
    (re.compile(r"(?<=\d)(?:\\[ ,;:!]|[~\s])*\\pmod\s*\{?\d+\}?"), ""),
    # math-verify takes what follows the word "answer" before anything later; here the last value counts, so that
    # "the answer is 12 or 13" is not right about 12.
    (re.compile("answer", re.IGNORECASE), "result"),
]


def normalize(text: str) -> str:
    """Write what math-verify would misread, such as 1e5 as 1, in a way that it reads."""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = LARGE.sub(large, text)
    return REPEATING.sub(repeating, MIXED_PERCENT.sub(mixed, MIXED.sub(mixed, text)))


def find(text: str) -> Any:
    """Parse the answer in a completion; an empty list if it has none."""
    text = normalize(text)
    # A point or an interval is LaTeX to math-verify, which would take the last number in it.
    return parse(text if LATEX.search(text) else TUPLE.sub(r"$\g<0>$", text), parsing_timeout=None)


def large(match: re.Match[str]) -> str:
    """A number such as 1.5 million in digits."""
    return format(Decimal(match[1].replace(",", "")).scaleb(ZEROS[match[2].lower()]), "f")


def mixed(match: re.Match[str]) -> str:
    """A whole number and a proper fraction as one fraction."""
    whole, numerator, denominator = map(int, match.groups())
    if not 0 < numerator < denominator:
        return match[0]
    improper = whole * denominator + numerator
    return rf"\frac{{{improper}}}{{{denominator}}}" if "\\" in match[0] else f"{improper}/{denominator}"


def repeating(match: re.Match[str]) -> str:
    """A decimal number whose last digits repeat, as a fraction."""
    whole, once, period = match.groups()
    numerator = int(whole + once + period) - int(whole + once or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(once)}}}"


def same_words(gold: str, text: str) -> bool:
    r"""Whether the reference answer is words, as in \text{June 20}, and all boxes of a text say these."""
    words = WORDS.fullmatch(gold.strip())
    boxes = {_words(box) for box in BOXES.findall(text)}
    return words is not None and boxes == {_words(words[1])}


def _words(text: str) -> str:
    return " ".join(
        re.sub(r"\\(?:text|textbf|mathrm|mbox)(?![a-z])|\\[ ,]|[{}~]", " ", text).casefold().replace(",", " ").split()
    )


def same_base(gold: str, text: str) -> bool:
    """Whether the last number of a text has the base of the reference answer, where both say one."""
    wanted, found = BASE.findall(gold), BASE.findall(text)
    return not wanted or not found or wanted[-1] == found[-1]


def same_brackets(gold: str, found: str) -> bool:
    """Whether neither is a set in braces while the other is a point or an interval, which math-verify takes for a set."""
    return not any(
        one.startswith(r"\{") and re.match(r"(?:\\left)?\s*[(\[].*,", other) for one, other in ((gold, found), (found, gold))
    )


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> Any:
    """Parse a reference answer: a number, perhaps with a unit, or else a formula; None if it is neither."""
    text = normalize(gold.strip())
    if DATE.search(text):
        return None
    if not re.search(r"\\boxed|\\\(|\\\[|\$.*\$", text) and not (NUMBER.fullmatch(text) and re.search(r"\d", text)):
        formula = re.sub(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^}]*\}", "", text)
        if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", formula):
            return None  # words, which LaTeX would read as products of letters
        text = f"${text}$"
    parsed = parse(text, parsing_timeout=None)
    return parsed if parsed and not isinstance(parsed[0], str) else None


def answer(request: list[str]) -> bool:
    """Answer one request."""
    gold = parse_gold(request[0])
    if gold is None:
        return False
    if len(request) == 1:
        return bool(verify(gold, gold, timeout_seconds=None))
    if same_words(*request):
        return True
    found = find(request[1])
    if not same_base(*request) or not same_brackets(str(gold[-1]), str(found[-1]) if found else ""):
        return False
    return bool(verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None))


def value(text: str) -> str | None:
    """The answer in a text, numbers to the six places that they are compared to; None if there is none."""
    parsed = find(text)
    if not parsed:
        return None
    found = parsed[0]
    if isinstance(found, Eq) and found.lhs.is_Symbol:  # x = 5, which is compared as 5
        found = found.rhs
    try:
        number = float(found.evalf())
    except (AttributeError, TypeError, ValueError, OverflowError):  # a formula
        return str(found)
    return f"{round(number, 6) + 0.0:.6f}" if isfinite(number) else str(found)


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
