"""Find the answer in a text, and rewrite it in a form that math-verify reads.

    to_ascii           Unicode signs become ASCII or LaTeX; all other functions expect this form
    answer_window      the part of a long completion in which its answer is
    out_of_brackets    units in brackets: "9 (apples)"
    without_remark     remarks in brackets: "18 dollars (9 eggs at $2)"
    is_bound           whether the text gives only a bound: "at least 18"
    normalize          rewrites numbers, signs and LaTeX that math-verify would misread
    bare_formula       a formula without LaTeX delimiters

`math_worker.py` imports this file as a script, outside of the package: it must not import anything else of this project.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal

# ---- signs, and the part of a text that holds its answer

WINDOW = 6_000  # characters before the last box or the end that are searched: a policy may write without end
INVISIBLE = re.compile("[\u200b-\u200d\u2060\ufeff\ufe0f]")
VULGAR = re.compile("([0-9]?)([\u00bc-\u00be\u2150-\u215e])")
WIDE = re.compile("[\uff05-\uff5e]+")  # full-width digits and signs
POWER = re.compile("(?<=[0-9)}])([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)")  # 10^6 as one sees it
ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z]))")
SYMBOLS = {
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u00b1": r"\pm ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u00f7": "/",
    "\u2044": "/",  # the fraction slash, which NFKC puts into one half and the like
    "\u3002": ". ",
}


def to_ascii(text: str) -> str:
    """Replace Unicode signs by ASCII or LaTeX, and normalize white space."""
    text = re.sub(r"[^\S\n]+", " ", INVISIBLE.sub("", text))
    text = re.sub(r"\s*\n\s*", "\n", text)
    if text.isascii():
        return text
    text = VULGAR.sub(lambda match: f"{match[1]} {unicodedata.normalize('NFKC', match[2])}".strip(), text)
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = POWER.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[1])}}}", text)
    text = ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    for symbol, replacement in SYMBOLS.items():
        text = text.replace(symbol, replacement)
    return text


def answer_window(text: str) -> str:
    """The part of a completion that holds its answer: the text around the last box, or the end; it begins with a whole line."""
    end = text.rfind(r"\boxed")
    end = len(text) if end < 0 else end + WINDOW
    start = max(0, min(end, len(text)) - WINDOW - (WINDOW if end < len(text) or r"\boxed" in text else 0))
    part = text[start:end]
    return part[part.find("\n") + 1 :] if start else part


# ---- units and remarks in brackets

# Words that are not units: functions, and moduli and bases, which change the number before them.
NO_UNIT = re.compile(
    r"\b(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|max|min|lim|b?mod|modulo|base|pi)\b", re.IGNORECASE
)
LARGE_WORDS = re.compile(r"(?:thousand|million|billion|trillion)\b", re.IGNORECASE)  # these belong to the number
UNIT_WORD = r"(?:[A-Za-z]+(?:['-][A-Za-z]+)*|[$%\u00b0\u20ac\u00a3\u00a5])\.?"
BRACKETS = re.compile(  # 9 (apples), 20 (km/h), 5 (cm^2); possessive quantifiers, since a policy may write digits without end
    r"(?P<number>(?<![\w.,^])(?<![\^_]\{)"
    r"(?:(?:\d++(?:,\d++)*+)?(?:\.\d++)?(?<=\d)(?:\s?/\s?\d++)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})(?:\s?%)?)"
    rf"(?P<gap>\s*)\(\s*(?P<unit>{UNIT_WORD}(?:(?:\s+|\s*/\s*){UNIT_WORD})*(?:\s*\^\s*\{{?[23]\}}?)?)\s*\)"
)
UNCLEAR = re.compile(r"\d\s*\(\s*(?:r\.?\s*\d|(?:or|and)\b)", re.IGNORECASE)  # more than one number: 3 (R 2), 3 (or 4)
OTHERWISE = re.compile(  # "(or 13)", "(about 18)", "(= 18)"
    r"\W*(?:or|and|maybe|perhaps|possibly|i\.?\s?e|that\s+is|which|approx\w*|about|around|rounded|roughly|equals)\b|\s*[=\u2248~]",
    re.IGNORECASE,
)
REMARK = re.compile(  # behind an answer that is the whole text, or that follows "the answer is"
    r"(?:\A|\banswer\s*(?:is\b|:))[\s:*_]*(?P<stated>[$\u20ac\u00a3]?-?\d[\d,./]*%?(?:\s+[A-Za-z]+){0,3})[*_]*"
    r"\s+\((?P<remark>[^()]*)\)[\s.!*_]*\Z",
    re.IGNORECASE,
)


def out_of_brackets(text: str, is_unit: Callable[[str], bool], alone: bool = False) -> str:
    """Remove the brackets around units behind numbers, and other words in such brackets altogether.

    Args:
        text: A completion or a reference answer.
        is_unit: Whether words are a unit that can be compared.
        alone: Leave a text unchanged if words would be removed behind more than one number, since it is then not one answer.

    Example:
        >>> [out_of_brackets(text, {"km"}.__contains__) for text in ("9 (apples)", "5 (km)", "3 (mod p)", "2 (x)", "4 (or five)")]
        ['9', '5 km', '3 (mod p)', '2 (x)', '4 (or five)']
    """

    def unit(match: re.Match[str]) -> str | None:
        number, words = match["number"], match["unit"]
        letters = max((len(word) for word in re.findall("[A-Za-z]+", words)), default=3)
        if LARGE_WORDS.match(words) or (is_unit(words) and (letters > 2 or match["gap"])):
            return f"{number} {words}"
        # Alternatives such as "(or 13)", and factors as in 2(ab), stay.
        return None if OTHERWISE.match(words) or NO_UNIT.search(words) or letters < 3 else number

    matches = list(BRACKETS.finditer(text))
    if alone and len(matches) > 1 and any(unit(match) in (None, match["number"]) for match in matches):
        return text
    return BRACKETS.sub(lambda match: unit(match) or match[0], text)


def without_remark(text: str) -> str:
    """Remove the remark in brackets behind an answer, unless the remark repeats the answer or gives another one.

    Example:
        >>> without_remark("18 dollars (9 eggs at $2)"), without_remark("12 (or 13)")
        ('18 dollars', '12 (or 13)')
    """
    match = REMARK.search(text)
    if match is None or OTHERWISE.match(match["remark"]) or not re.search(r"[A-Za-z%]|\d\D+\d", match["remark"]):
        return text
    return text[: match.end("stated")]


WRAPPED = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
PLAIN: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\{,\}|\\!|\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:[ ,;:]|q?quad(?![A-Za-z]))|~"), " "),
    (re.compile(r"\{\}\s*(?=\^)"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:degree|circ)(?![A-Za-z])"), "\u00b0"),
    (
        re.compile(r"\\[dt]?frac\s*\{\s*([^\W\d_]+(?:\s*\^\s*\{?\d\}?)?)\s*\}\s*\{\s*([^\W\d_]+(?:\s*\^\s*\{?\d\}?)?)\s*\}"),
        r" \1/\2",
    ),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\*\*+|__+"), ""),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])|[\u22c5\u2022*]"), "\u00b7"),
    (re.compile(r"\u00b0\s*(?=[CF]\b)|\bdegrees?\s+(?=(?:[CF]|celsius|fahrenheit)\b)", re.IGNORECASE), " "),
    (re.compile(r"\bfl(?:uid|\.)?\s*(?:oz|ounces?)\b", re.IGNORECASE), "floz"),
    (re.compile(r"\bmph\b", re.IGNORECASE), "miles/hour"),
    (re.compile(r"\bkm?ph\b|\bkmh\b", re.IGNORECASE), "km/h"),
    (re.compile(r"\bper\s+cent\b", re.IGNORECASE), "percent"),
    (re.compile(r"\b(?:kWh|kilowatt[- ]hours?)\b"), "kwh"),
    (re.compile(r"\b(?:US|U\.S\.|American)\s*(?=dollars?\b|\$)"), ""),
]


def plain_units(text: str) -> str:
    r"""Write units in ASCII: `5\ \frac{\text{m}}{\text{s}}` becomes 5 m/s. Only for finding units, since it damages formulas."""
    text = WRAPPED.sub(r" \1", WRAPPED.sub(r" \1", text))
    for pattern, replacement in PLAIN:
        text = pattern.sub(replacement, text)
    return text


# ---- bounds instead of numbers

HEDGE = re.compile(  # at the end of a normalized text: "between 3 and 5", "not 5", "x < 5"
    r"(?:\bbetween\s+[-$\d.,]+\s+and|\b(?:not|isn't)|!=|\\ne|(?<=[a-z]) ?[<>]=?|(?<=[a-z]) \\[gl]e)\s*[$]?-?[\d.,]+[\s.!]*\Z",
    re.IGNORECASE,
)
# Bounds are searched for in the box, or in the sentence with the last number, in which each number is written as #.
#
# "At least 18" and "18 or more" are bounds, and not 18, if they are the answer: after is, are, be, a colon or an equals sign, or
# as the whole answer or box. After another verb "at least 18" says how many are needed, and is 18 ("She needs at least 18
# eggs"); so it does in "There must be at least 18", and at the beginning of a sentence ("At least 18 eggs are needed").
# "More than 18" is a bound after every verb, except in a difference, where a number comes first ("18 more than Ann", "5 less than
# 18"), and in the largest number that is possible ("He cannot buy more than 18").
NUMBER = re.compile(r"-?(?:\d[\d,]*)?(?:\\(?:[dt]?frac|sqrt)\s*\{[^{}]*\}(?:\s*\{[^{}]*\})?|\.?\d+(?:/\d+)?)")
EXPONENT = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?-?\d\}?")  # of a unit, as in cm^2
MACRO = re.compile(r"\\(?:text\w*|math\w+|mbox|boxed|fbox)\s*(?=\{)|\\[ ,;:!()\[\]]|\\(?=[$%])|[{}*_$~]")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z*$\\])|\n")
THAN = r"(?:more|less|fewer|greater|higher|lower|larger|bigger|smaller)\s+than"
BEFORE = (
    rf"(?:(?:just|slightly|any\w*)\s+)?(?:at\s+(?:least|most)|(?:(?:no|not)\s+)?{THAN}"
    r"|over|under|above|below|up\s+to|a\s+(?:min|max)imum\s+of)\s+#"
)
AFTER = (
    r"#\s*(?:[a-z]+\s+){0,2}(?:at\s+(?:least|most)"
    r"|(?:or|and)\s+(?:more|less|fewer|greater|higher|lower|larger|smaller|over|under|above|below)(?!\s+than))\b"
)
IS = r"(?:\b(?:is|are|was|were|be|equals)\b|'s\b|[:=])\s*"
IS_BOUND = re.compile(rf"{IS}(?:{BEFORE}|{AFTER})[^#]*\Z", re.IGNORECASE)
ONLY_BOUND = re.compile(rf"[^\w#]*(?:{BEFORE}|{AFTER})(?:\s+[a-z]+){{0,2}}[^\w#]*\Z", re.IGNORECASE)
AND_MORE = re.compile(r"#\s?\+(?:\s+[A-Za-z]{2,}[^#]*|[^\w#]*)\Z")
THERE_IS = re.compile(rf"\bthere\s+(?:\w+\s+){{0,2}}{IS}{BEFORE}[^#]*\Z", re.IGNORECASE)
BEYOND = re.compile(rf"\b{THAN}\s+#[^#]*\Z", re.IGNORECASE)
NO_BOUND = re.compile(r"#|n't\b|\b(?:cannot|not|no|never|nor)\b", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")


def is_bound(text: str) -> bool:
    """Whether a text answers with a bound instead of a number.

    Example:
        >>> is_bound("The answer is at least 18."), is_bound("She needs at least 18 eggs.")
        (True, False)
    """
    boxes = BOX.findall(text)
    mark = re.compile(r"\\(?:boxed|fbox)" if boxes else r"\d")
    said = _numbers_as_hashes(next((part for part in reversed(SENTENCE.split(text)) if mark.search(part)), ""))
    if IS_BOUND.search(said) and not THERE_IS.search(said):
        return True
    if boxes:
        said = _numbers_as_hashes(boxes[-1])
        return bool(ONLY_BOUND.match(said) or AND_MORE.search(said))
    beyond = BEYOND.search(said)
    return bool(ONLY_BOUND.match(said) or AND_MORE.search(said) or (beyond and not NO_BOUND.search(said[: beyond.start()])))


def _numbers_as_hashes(text: str) -> str:
    """A sentence without LaTeX, with # for each number."""
    return " ".join(MACRO.sub(" ", NUMBER.sub("#", EXPONENT.sub("", text))).split())


# ---- forms that math-verify reads

LARGE = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s*(thousand|million|billion|trillion)\b", re.IGNORECASE)
ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MIXED = re.compile(r"(?<![\w./,$}])(\d+) (\d+)/(\d+)(?![\w/])")  # 1 1/2
MIXED_PERCENT = re.compile(r"(?<![\w}.])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}(?=\s*\\?%)")  # 33\frac{1}{3}\%
FRACTION_PERCENT = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}\s*\\?%")  # math-verify cannot read this
REPEATING = re.compile(r"(?<![\w.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")  # 0.1\overline{6}
ONE = r"\\(?!sqrt|[dt]?frac|text|math|left|binom|log|sin|cos|tan|ln)[a-z]+(?![a-zA-Z])|\d|[a-z](?![a-z])"  # argument without { }


def _fraction(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1].strip('{}')}}}{{{match[2].strip('{}')}}}"


REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\bUSD?\s?(?=\\?\$)"), ""),
    (re.compile("~"), " "),  # TeX's space, or "about"
    (re.compile(r"(?<=[\u3040-\u9fff])(?=[-$\\\d])"), " "),  # Chinese and Japanese put no space before a number
    (re.compile(r"\\[dt]?frac\s*(ONE|\{[^{}]*\})\s*(ONE|\{[^{}]*\})".replace("ONE", ONE)), _fraction),  # \frac12, \frac \pi4
    # \text{} beside or around a number: \text{\$}18, \text{-}7, \text{(073)}.
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*(\\?\$|-)?\s*\}"), r"\1"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*\((-?\d[\d.,]*)\)\s*\}"), r"\1"),
    (re.compile(r"\\(?:underline|bm|pmb)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:text)?color\s*\{\w*\}"), ""),
    (re.compile(r"\\\\\s*(?=\}\s*(?:\$|\\[)\]]|\Z))"), ""),  # \boxed{5\\}
    (re.compile(r"\\langle\b"), "("),
    (re.compile(r"\\rangle\b"), ")"),
    (re.compile(r"\\varnothing\b"), r"\\emptyset"),
    (re.compile(r"(?<=\{)\s*(?=(?:\\(?:geq?|leq?|neq?|gt|lt)(?![A-Za-z])|[<>])\s*-?[\d.\\])"), "x"),  # \boxed{\ge 5} is not 5
    (re.compile(r"(?<=\d)(?:\\[ ,;:!]|[~\s])*(?:\\bmod\s*\d+|\\text\s*\{\s*\(?mod\s*\d+\)?\s*\})"), ""),  # 73 \bmod 100
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), "*"),  # 1.2 x 10^6
    (re.compile(r"(?<![\w.])(\d*\.\d*?)(\d)\2{2,}(?:\.\.\.|\u2026|\\[lc]?dots)"), r"\1\\overline{\2}"),  # 0.333...
    (re.compile(r"(?<![\w.])(\d*\.\d*)\((\d+)\)"), r"\1\\overline{\2}"),  # 0.1(6)
    (re.compile(r"(?<![\w)}] )\b(?:negative|minus)\s+(?=\d)", re.IGNORECASE), "-"),
    (re.compile(r"\bper\s?cent\b", re.IGNORECASE), "%"),
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
    ),  # 1,2345 is two numbers or a typing error, and not 1,234 followed by a 5
    (re.compile(r"(?<==)\s*-?\d{1,3}(?:,\d{3})+(?![\d,])"), lambda match: match[0].replace(",", "")),  # $x = 1,234$
    (re.compile(r"(?<![\d.])\d+(?:\.\d+){2,}"), "x"),  # 1.000.000 or 1.2.3 is neither 1.000 nor 1.2
    (re.compile(r"(?<=[^\W\d_]):(?=[-$\d\\])"), ": "),  # Answer:5
    (re.compile(r"(?<=\d) : (?=\d)"), "/"),  # 2 : 3
    (re.compile(r"\+\s*(?=\\infty)"), ""),
    (re.compile(r"(?<![A-Za-z\\])[A-Za-z]\s*\\in\s*(?=[(\[]|\\left|\\\{)"), ""),  # x \in (1, 2)
    (re.compile(r"\\(?:mathbf|boldsymbol|bf)\s*\{(\w*)\}"), r"\1"),
    (re.compile(r"\\fbox(?=\s*\{)"), r"\\boxed"),
    # \boxed{\textbf{(B)}\ 27}: the answer is the value, and not the letter of the choice
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
    # math-verify prefers what follows the word "answer" to anything later. Here the last value counts, so that "the answer is
    # 12 or 13" is not right for 12.
    (re.compile("answer", re.IGNORECASE), "result"),
    (re.compile(r"(?<![\d.,])(?<!\d )(\d{1,3}(?: \d{3})+)(?!\d)"), lambda match: match[1].replace(" ", "")),  # 12 000
    # 1 2 is two numbers and not a sum; 1 1/2 is one number
    (re.compile(r"(?<=\d) +(?=\d)(?!\d+/\d)"), ", "),
]


def normalize(text: str) -> str:
    """Rewrite what math-verify would misread (1e5 as 1, for example) in a form that it reads."""
    text = to_ascii(text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = LARGE.sub(_large_in_digits, text)
    text = MIXED_PERCENT.sub(_mixed_as_fraction, MIXED.sub(_mixed_as_fraction, text))
    return REPEATING.sub(_repeating_as_fraction, FRACTION_PERCENT.sub(r"\\frac{\1}{\g<2>00}", text))


def _large_in_digits(match: re.Match[str]) -> str:
    """Write a number such as 1.5 million in digits."""
    return format(Decimal(match[1].replace(",", "")).scaleb(ZEROS[match[2].lower()]), "f")


def _mixed_as_fraction(match: re.Match[str]) -> str:
    """Write a whole number and a proper fraction as one fraction."""
    whole, numerator, denominator = map(int, match.groups())
    if not 0 < numerator < denominator:
        return match[0]
    improper = whole * denominator + numerator
    return rf"\frac{{{improper}}}{{{denominator}}}" if "\\" in match[0] else f"{improper}/{denominator}"


def _repeating_as_fraction(match: re.Match[str]) -> str:
    """Write a decimal number with a repeating end as a fraction."""
    whole, once, period = match.groups()
    numerator = int(whole + once + period) - int(whole + once or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(once)}}}"


# ---- formulas without delimiters

FORMULA = re.compile(r"[$]|\\[(\[]|\\begin\b|\\boxed\b|\\fbox\b")
RESULT = re.compile(  # what `normalize` has made of the word "answer"
    r"\b(?:result\b\s*(?:is\b|[:=])|(?:results|solutions|roots|zeros)\s+are\b)[\s:*_]*", re.IGNORECASE
)
MEASURE = re.compile(  # a number, with or without a unit, which math-verify reads as it is
    r"(?=[-+$\u20ac\u00a3\u00a5]*[\d.])[-+]?[$\u20ac\u00a3\u00a5]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?\d*\s?/\s?\d+)?"
    r"\s*(?:%|\u00b0|\s(?!(?:and|or)\b)[A-Za-z/^23. ]*|[A-Za-z/]{2,}[A-Za-z/^23]*|[defghlms])?"
)
CHOICE = re.compile(r"\([A-J]\)")  # (B) 27
NO_WORDS = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|or|and|pi)\b|(?<=[\d)}^*/])[a-z]{1,2}(?![a-z])")


def bare_formula(text: str) -> str | None:
    r"""Find a formula without delimiters in a normalized text, and put it between `$ $`.

    The formula is the whole text, or what follows "the answer is". Returns None if there is none.

    Example:
        >>> bare_formula(r"2\sqrt{3}."), bare_formula("The result is: x^2-4"), bare_formula("18 km"), bare_formula("18 of them")
        ('$2\\sqrt{3}$', '$x^2-4$', None, None)
    """
    if FORMULA.search(text):
        return None
    said = RESULT.split(text)[-1].strip(" \n.*_=")
    if not said or len(said) > 200 or not said.isascii() or "\n" in said or MEASURE.fullmatch(said) or CHOICE.match(said):
        return None
    if re.search(r"[A-Za-z]{2}", NO_WORDS.sub(" ", said)):
        return None
    return "$" + re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", said) + "$"
