"""The worker process that parses and compares mathematical answers with the library math-verify.

`match.py` starts it as a script. It writes `ready`, then reads one JSON request per line, such as `["equal", gold, text]`, and
writes one reply per line: the result of that function in `REQUESTS`. If a request uses more CPU time than the script's argument,
SIGPROF ends the process; nothing in sympy can delay or catch it. To start in a third of a second, the worker runs outside the
package: from this project it imports only `math_text.py` and `math_units.py`.
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

sys.path.append(str(Path(__file__).parent))  # at the end, so that the files here do not hide other modules
import math_text as forms  # type: ignore[import-not-found]
import math_units as units  # type: ignore[import-not-found]

MEMORY_BYTES = 4 * 2**30  # address space: expressions such as 9^9^9 must not take all the machine's memory
# Such as a date, or 3 (R 2).
NO_NUMBER = re.compile(r"\d{4}-\d\d?-\d\d?|\d\s*\(\s*(?:r\.?\s*\d|(?:or|and)\b)|\d (?:mod|base)\b", re.IGNORECASE)
TUPLE = re.compile(r"(?<![\w$\\({\[])[(\[]\s*NUM(?:\s*,\s*NUM)+\s*[)\]]".replace("NUM", r"-?\d+(?:\.\d+)?(?:/\d+)?"))
WORDS = re.compile(r"\$?\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*[A-Za-z][^{}]*)\}\$?")
MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)(?![a-z])|\\[ ,]|[{}~,:*$]")
# Marks that must agree if both answers have them: the base in 2516_8, and a.m. or p.m. for 6:00.
MARKS = [re.compile(r"\d_\{?(\d+)\}?"), re.compile(r"\d\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?([ap])\.?\s?m\b", re.IGNORECASE)]
SMALL = 1e-3  # below this, six places hold little or no information about a number


def main() -> None:
    """Answer requests until standard input ends."""
    logging.disable(logging.CRITICAL)
    for stop in (signal.SIGINT, signal.SIGTERM):  # the trainer handles these, and still needs scores while it stops
        signal.signal(stop, signal.SIG_IGN)
    if sys.platform == "linux":  # on other systems the address space does not measure memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    replies, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        function, *texts = json.loads(line)
        result = REQUESTS[function](*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=replies, flush=True)


@lru_cache(maxsize=4096)
def is_gold(gold: str) -> bool:
    """Whether answers can be compared with a reference answer."""
    parsed = parse_gold(gold)
    return parsed is not None and bool(verify(parsed, parsed, timeout_seconds=None))


def equal(reference: str, text: str) -> bool:
    """Whether the answer in a text equals a reference answer."""
    gold = parse_gold(reference)
    if gold is None or same_words(reference, text):
        return gold is not None
    for mark in MARKS:
        stated, said = mark.findall(reference), mark.findall(text)
        if stated and said and stated[-1].lower() != said[-1].lower():
            return False
    text, number = answer_part(text), as_number(gold)
    if number is not None and not forms.is_bound(text):  # in a formula such as 5m + 3s the letters are not units
        (wanted, _), (given, bare) = (units.find_unit(units.plain_units(each)) for each in (gold_text(reference), text))
        factors = units.conversion_factors(wanted, given)
        text = bare if wanted and bare else text
        if 1.0 not in factors:  # 90 minutes are 1.5 hours
            found = as_number(parse_answer(text))
            return found is not None and any(isclose(found * factor, number, rel_tol=1e-6) for factor in factors)
    if equal_parsed(gold, parse_answer(text)):
        return True
    # 12.5% equals 12.5 if only one of the two has the percent sign, as math-verify does for whole numbers.
    if ("%" in reference) == ("%" in text):
        return False
    gold, text = (re.sub(r"\\?%", "", each) for each in (reference, text))
    return parse_gold(gold) is not None and equal_parsed(parse_gold(gold), parse_answer(text))


def same_words(gold: str, text: str) -> bool:
    r"""Whether the reference answer is words, as in \text{June 20}, and all boxes of a text, or its end, are the same words."""
    words = WORDS.fullmatch(gold.strip())
    said = forms.BOX.findall(text) or re.split(r"(?i)answer(?:\s+is\b|\s*:)", text)[-1:]
    plain = (MARKUP.sub(" ", part).casefold().split() for part in (*said, words[1] if words else ""))
    return words is not None and len({" ".join(part).rstrip(". ") for part in plain}) == 1


def canonical_answer(text: str) -> str | None:
    """The answer in a text, the same for equal answers: numbers are rounded to the six compared places. None if none is found."""
    parsed = parse_answer(answer_part(text))
    if not parsed:
        return None
    if (number := as_number(parsed)) is not None:
        places = f"{round(number, 6) + 0.0:.6f}".rstrip("0").rstrip(".")
        return places if abs(number) >= SMALL or not number else f"{number:.2e}"
    return str(parsed[0].rhs if isinstance(parsed[0], Eq) and parsed[0].lhs.is_Symbol else parsed[0])


def equal_parsed(gold: Any, found: Any) -> bool:
    """Whether two parsed answers are equal; numbers below `SMALL` also to one part in a hundred, not just to six places."""
    texts = str(gold[-1]), str(found[-1]) if found else ""
    for one, other in (texts, texts[::-1]):  # math-verify reads a set in braces as a point or an interval
        if one.startswith(r"\{") and re.match(r"(?:\\left)?\s*[(\[].*,", other):
            return False
    if not verify(gold, in_order(found), allow_set_relation_comp=True, timeout_seconds=None):
        return False
    wanted, given = as_number(gold), as_number(found)
    if wanted is None or given is None or not 0 < abs(wanted) < SMALL:
        return True
    return any(abs(given * scale - wanted) <= 0.01 * abs(wanted) for scale in (1, 0.01, 100))  # percent


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> Any:
    """Parse a reference answer, a number with or without a unit, or a formula; None if it is neither."""
    gold = gold_text(gold)
    text = forms.normalize(units.find_unit(units.plain_units(gold))[1] or gold)
    if NO_NUMBER.search(text) or forms.is_bound(text):
        return None
    if not re.search(r"\\boxed|\\\(|\\\[|\$.*\$", text) and not forms.MEASURE.fullmatch(text.strip()):
        formula = re.sub(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^}]*\}", "", text)
        if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", formula):
            return None  # words would be parsed as products of letters
        text = f"${text}$"
    parsed = parse(text, parsing_timeout=None)
    return parsed if parsed and not isinstance(parsed[0], str) else None


def gold_text(gold: str) -> str:
    """A reference answer in ASCII and LaTeX, without brackets around words: "9 (apples)" becomes 9 apples."""
    return str(units.IN_BRACKETS.sub(r" \g<words>", forms.to_ascii(gold.strip())))


def answer_part(completion: str) -> str:
    """The part of a completion that holds its answer, in ASCII and LaTeX, without a remark after the answer."""
    return str(units.REMARK.sub(r"\g<stated>", gold_text(forms.answer_window(forms.to_ascii(completion)))))


def parse_answer(text: str) -> Any:
    """Parse the answer in a text that `answer_part` returned; an empty list if there is none."""
    if forms.is_bound(text):
        return []
    text = forms.normalize(text)
    formula = forms.bare_formula(text)
    if formula and (parsed := parse(formula, parsing_timeout=None)):
        return parsed
    if r"\boxed" not in text and forms.HEDGE.search(text):
        return []
    # A point or an interval is marked as LaTeX: in plain text math-verify would read only its last number.
    return parse(text if re.search(r"[$]|\\[(\[A-Za-z]", text) else TUPLE.sub(r"$\g<0>$", text), parsing_timeout=None)


def as_number(parsed: Any) -> float | None:
    """A parsed answer as a finite number; None if it is not one."""
    answer: Any = parsed[0] if parsed else None
    if isinstance(answer, Eq) and answer.lhs.is_Symbol:  # x = 5 is compared as 5
        answer = answer.rhs
    try:
        result = float(answer.evalf().doit())  # doit: a percentage is a product, which evalf alone does not multiply out
    except (AttributeError, TypeError, ValueError, OverflowError):  # a formula
        return None
    return result if isfinite(result) else None


def in_order(found: Any) -> Any:
    """Sort an answer such as "y = 3 and x = 2" by its variables, since math-verify compares it with a point such as (2, 3)."""
    parts = list(getattr(found[0], "_unsorted_args", [])) if found else []
    if not parts or not all(isinstance(part, Eq) for part in parts) or len({part.lhs for part in parts}) < len(parts):
        return found
    return [type(found[0])(*sorted(parts, key=lambda part: str(part.lhs))), *found[1:]]


REQUESTS: Any = {"is_gold": is_gold, "equal": equal, "canonical_answer": canonical_answer}

if __name__ == "__main__":
    main()
