"""Finds the answer in a text, and rewrites it in a form that math-verify reads.

`math_worker.py` imports this file as a script, outside the package: it must not import anything else of this project.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal

WINDOW = 6_000  # characters to search before the last box or the end: a policy may write without end
POWER = re.compile("(?<=[0-9)}])([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)")  # 10^6 as readers see it
ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z]))")
# Invisible signs, minus signs, and the fraction slash, which NFKC puts into one half and similar signs.
SIGNS = {**dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\ufe0f", ""), **dict.fromkeys("\u2212\u2012\u2013", "-")}
SIGNS |= {"\u2044": "/", "\u00f7": "/", "\u3002": ". ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b1": r"\pm "}
SIGNS |= {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup "}


def to_ascii(text: str) -> str:
    """Replace Unicode signs by ASCII or LaTeX, and normalize white space."""
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))
    if text.isascii():
        return text
    text = re.sub("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # 1 1/2, with its fraction as one sign
    text = POWER.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[1])}}}", text)
    text = ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = re.sub("[^\u00b2\u00b3]+", lambda match: unicodedata.normalize("NFKC", match[0]), text)  # else 15 m^2 would read as 2
    return re.sub("|".join(SIGNS), lambda match: SIGNS[match[0]], text)


def answer_window(text: str) -> str:
    """The part of a completion that holds its answer: the text around the last box, or the end. It begins with a whole line."""
    box = text.rfind(r"\boxed")
    start = max(0, (box if box >= 0 else len(text)) - WINDOW)
    part = text[start : box + WINDOW if box >= 0 else None]
    return part[part.find("\n") + 1 :] if start else part


BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
HEDGE = re.compile(  # at the end of a normalized text: "between 3 and 5", "not 5", "x < 5"
    r"(?i)(?:\bbetween\s+[-$\d.,]+\s+and|\b(?:not|isn't)|!=|\\ne|(?<=[a-z]) ?(?:[<>]=?|\\[gl]e))\s*[$]?-?[\d.,]+[\s.!]*\Z"
)
# Bounds are searched for in the box, and in the sentence with the last box or number, where each number is written as #.
#
# "At least 18" and "18 or more" are bounds, not 18, if they are the answer: after is, are, be, a colon or an equals sign, or as
# the whole answer or box. After another verb, "at least 18" gives the number needed and is 18 ("She needs at least 18 eggs").
# "More than 18" is a bound after every verb, except in a difference, where a number comes first ("18 more than Ann", "5 less than
# 18"), and in the largest possible number ("He cannot buy more than 18"). "1 hour and 30 minutes" is not 30.
NUMBER = re.compile(r"-?(?:\d[\d,]*)?(?:\\(?:[dt]?frac|sqrt)\s*\{[^{}]*\}(?:\s*\{[^{}]*\})?|\.?\d+(?:/\d+)?)")
EXPONENT = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?-?\d\}?")  # exponent of a unit, as in cm^2
MACRO = re.compile(r"\\(?:text\w*|math\w+|mbox|boxed)\s*(?=\{)|\\[ ,;:!()\[\]]|\\(?=[$%])|[{}*_$~]")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z*$\\])|\n")
LARGE = "years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|min|feet|ft|pounds?|lbs?|dollars?|kg|km|m"
MORE = r"(?:more|less|fewer|greater|higher|lower|larger|bigger|smaller)"
SAID = (
    rf"(?:(?:(?:just|slightly|any\w*)\s+)?(?:at\s+(?:least|most)|(?:(?:no|not)\s+)?{MORE}\s+than"
    r"|over|under|above|below|up\s+to|a\s+(?:min|max)imum\s+of)\s+#"
    rf"|#\s*(?:[a-z]+\s+){{0,2}}(?:at\s+(?:least|most)|(?:or|and)\s+(?:{MORE}|over|under|above|below)(?!\s+than))\b)"
)
BOUND = re.compile(
    rf"(?:\b(?:is|are|was|were|be|equals)\b|'s\b|[:=])\s*{SAID}[^#]*\Z"
    rf"|\A[^\w#]*{SAID}(?:\s+[a-z]+){{0,2}}[^\w#]*\Z|#\s?\+(?:\s+[a-z]{{2,}}[^#]*|[^\w#]*)\Z"
    rf"|#\s?(?:{LARGE})\b[\s,.]*(?:and\s+)?#\s?[a-z]+\b[^#]*\Z"
    rf"|\A(?:(?!n't\b|\b(?:cannot|not|no|never|nor)\b)[^#])*\b{MORE}\s+than\s+#[^#]*\Z",
    re.IGNORECASE,
)


def is_bound(text: str) -> bool:
    """Whether a text answers with a bound instead of a number: "is at least 18", but not "She needs at least 18 eggs"."""
    box = BOX.findall(text)[-1:]
    mark = r"\\boxed" if box else r"\d"
    sentence = next((part for part in reversed(SENTENCE.split(text)) if re.search(mark, part)), "")
    plain = (MACRO.sub(" ", NUMBER.sub("#", EXPONENT.sub("", part))) for part in (sentence, *box))
    return any(BOUND.search(" ".join(part.split())) for part in plain)


ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ONE = r"\\(?!sqrt|[dt]?frac|text|math|left|binom|log|sin|cos|tan|ln)[a-z]+(?![a-zA-Z])|\d|[a-z](?![a-z])"  # argument without { }


def _large_in_digits(match: re.Match[str]) -> str:
    return format(Decimal(match[1].replace(",", "")).scaleb(ZEROS[match[2].lower()]), "f")


def _repeating_as_fraction(match: re.Match[str]) -> str:
    whole, once, period = match.groups()
    return rf"\frac{{{int(whole + once + period) - int(whole + once or 0)}}}{{{'9' * len(period)}{'0' * len(once)}}}"


REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r'[`"~#\u201c\u201d\u2248]|</?[A-Za-z]+>|(?<=\d)\.(?=\s*\})', " "),  # `5`, "5", ####5, <answer>5</answer>, ~5, \boxed{5.}
    (rf"\\[dt]?frac\s*({ONE})", r"\\frac{\1}"),  # \frac12, \frac \pi4
    (rf"\\[dt]?frac\s*(\{{[^{{}}]*\}})\s*({ONE})", r"\\frac\1{\2}"),
    (r"(?<=\{)\s*(?=(?:\\(?:geq?|leq?|neq?|gt|lt)(?![A-Za-z])|[<>])\s*-?[\d.\\])", "x"),  # \boxed{\ge 5} is not 5
    (r"(?<=\d)\s*(?:[\u00d7\u00b7]\s*(?=\d)|[xX]\s*(?=10\s*\^))", "*"),  # 1.2 x 10^6
    (r"(?<![\w.)}])\+(?=\d)", ""),  # +5
    (r"(?<=\d)[eE]([-+]?\d+)(?![\w.])", r"*10^(\1)"),  # 1e5
    (r"(?<=\d)(?:[_']|\{,\}|\\,)(?=\d{3}(?!\d))", ""),  # 1_000, 1'000, 1{,}000, 1\,000
    (r"(?<==)\s*-?\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", "")),  # $x = 1,234$
    (r"(?<=[^\W\d_]):(?=[-$\d\\])", ": "),  # Answer:5
    # \boxed{\textbf{(B)}\ 27}: the answer is the value, not the letter of the choice
    (r"(?<=\\boxed\{)[\s{]*(?:\\(?:text|math)\w*\s*\{\s*)?\([A-J]\)(?:\\[ ,;:!]|\\q?quad|[}~:\s])*(?=\S)", ""),
    (r"(?<=\d)\s+(?:[A-Za-z]+/[A-Za-z]+|[A-Za-z]{2,}\^\{?[23]\}?)(?=\s*\})", ""),  # \boxed{5 m/s}
    (r"\\text\s*\{\s*\\?\$?(-?\d[\d.,]*)\s+(?!(?:or|and|to|but|at)\b)[A-Za-z ]+\}", r"\1"),  # \text{18 dollars}
    (r"(?:\bUSD?\s?)?\\\$\s*(?=[\d.])|\bUSD?\s?(?=\$)", ""),  # \$5, US$5
    (r"(?<![\w$])-\s*[$\u20ac\u00a3\u00a5](?=[\d,.]+(?:\s|$))", "-"),  # -$5
    (r"(?<![\w)}.^])\((-?[\d.]+)\)", r" \1 "),  # (5), since math-verify reads 9 (3) as 12
    # math-verify prefers text after the word "answer" to anything later. Here the last value counts, so that "the answer is
    # 12 or 13" is not right for 12.
    ("(?i)answer", "result"),
    (r"(?<=\d) +(?=\d)(?!\d+/\d)", ", "),  # 1 2 is two numbers, not a sum; 1 1/2 is one number
    (rf"(?i)(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s*({'|'.join(ZEROS)})\b", _large_in_digits),  # 1.5 million
    (r"(?<![\w./,$}])(\d+) (\d+)/(\d+)(?![\w/])", r"(\1*\3+\2)/\3"),  # 1 1/2
    (r"(?<![\w.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}", _repeating_as_fraction),  # 0.1\overline{6}
]


def normalize(text: str) -> str:
    """Rewrite what math-verify would misread (1e5 as 1, for example) in a form that it reads."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


# "result" is the replacement of the word "answer" in `normalize`.
RESULT = re.compile(r"(?i)\b(?:result\b\s*(?:is\b|[:=])|(?:results|solutions|roots|zeros)\s+are\b)[\s:*_]*")
MEASURE = re.compile(  # a number, with or without a unit; math-verify reads it unchanged
    r"(?=[-+$\u20ac\u00a3\u00a5]*[\d.])[-+]?[$\u20ac\u00a3\u00a5]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?\d*\s?/\s?\d+)?"
    r"\s*%?(?:\u00b0|\s(?!(?:and|or)\b)(?:[A-Za-z/. ]|\^[23])*|[A-Za-z/]{2,}[A-Za-z/^23]*|[defghlms])?"
)
NO_WORDS = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|or|and|pi)\b|(?<=[\d)}^*/])[a-z]{1,2}(?![a-z])")


def bare_formula(text: str) -> str | None:
    """Find a formula without delimiters in a normalized text, and put it between `$ $`; None if there is none.

    The formula is the whole text, or the text after "the answer is".
    """
    said = RESULT.split(text)[-1].strip(" \n.*_=")
    if re.search(r"[$]|\\[(\[]|\\begin\b|\\boxed\b", text) or not said or len(said) > 200 or not said.isascii() or "\n" in said:
        return None
    if MEASURE.fullmatch(said) or re.match(r"\([A-J]\)", said) or re.search(r"[A-Za-z]{2}", NO_WORDS.sub(" ", said)):
        return None
    return "$" + re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", said) + "$"
