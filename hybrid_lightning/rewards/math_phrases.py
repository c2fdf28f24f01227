"""What the words around a number make of it: no answer, only a bound of one, or an answer with a remark in brackets.

For `math_worker.py`, as `math_text.py`; texts are as its `symbols` leaves them, if nothing else is said.
"""

import re
from collections.abc import Callable

HEDGE = re.compile(  # of a normalized text
    r"(?:\bbetween\s+[-$\d.,]+\s+and|\b(?:not|isn't)|!=|\\ne|(?<=[a-z]) ?[<>]=?|(?<=[a-z]) \\[gl]e)\s*[$]?-?[\d.,]+[\s.!]*\Z",
    re.IGNORECASE,
)

# Bounds are looked for in the box, or in the sentence with the last number; each number is written as # there.
#
# "At least 18" is not 18 where it is what the answer is: after is, are, be, a colon or an equals sign, or as the whole answer or
# box; so is "18 or more". After another verb it says how many are needed, which is 18 ("She needs at least 18 eggs"), as it does
# in "There must be at least 18" and where a sentence begins with it ("At least 18 eggs are needed").
# "More than 18" is 18 after no verb, but for a difference, where a number comes first ("18 more than Ann", "5 less than 18"), and
# for the largest number that is possible ("He cannot buy more than 18").
NUMBER = re.compile(r"-?(?:\d[\d,]*)?(?:\\(?:[dt]?frac|sqrt)\s*\{[^{}]*\}(?:\s*\{[^{}]*\})?|\.?\d+(?:/\d+)?)")
EXPONENT = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?-?\d\}?")  # of a unit
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
REMARK = re.compile(  # behind all of a text, or behind "the answer is"
    r"(?:\A|\banswer\s*(?:is\b|:))[\s:*_]*(?P<stated>[$\u20ac\u00a3]?-?\d[\d,./]*%?(?:\s+[A-Za-z]+){0,3})[*_]*"
    r"\s+\((?P<remark>[^()]*)\)[\s.!*_]*\Z",
    re.IGNORECASE,
)
OTHERWISE = re.compile(  # "(or 13)", "(about 18)", "(= 18)"
    r"\W*(?:or|and|maybe|perhaps|possibly|i\.?\s?e|that\s+is|which|approx\w*|about|around|rounded|roughly|equals)\b|\s*[=\u2248~]",
    re.IGNORECASE,
)


# What is no unit: functions, and moduli and bases, which change the number before.
NO_UNIT = re.compile(
    r"\b(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|max|min|lim|b?mod|modulo|base|pi)\b", re.IGNORECASE
)
LARGE = re.compile(r"(?:thousand|million|billion|trillion)\b", re.IGNORECASE)  # which belong to the number
UNIT_WORD = r"(?:[A-Za-z]+(?:['-][A-Za-z]+)*|[$%\u00b0\u20ac\u00a3\u00a5])\.?"
BRACKETS = re.compile(  # 9 (apples), 20 (km/h), 5 (cm^2); possessive, since a policy may write digits without end
    r"(?P<number>(?<![\w.,^])(?<![\^_]\{)"
    r"(?:(?:\d++(?:,\d++)*+)?(?:\.\d++)?(?<=\d)(?:\s?/\s?\d++)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})(?:\s?%)?)"
    rf"(?P<gap>\s*)\(\s*(?P<unit>{UNIT_WORD}(?:(?:\s+|\s*/\s*){UNIT_WORD})*(?:\s*\^\s*\{{?[23]\}}?)?)\s*\)"
)
UNCLEAR = re.compile(r"\d\s*\(\s*(?:r\.?\s*\d|(?:or|and)\b)", re.IGNORECASE)  # 3 (R 2), 3 (or 4): not one number


def out_of_brackets(text: str, is_unit: Callable[[str], bool], alone: bool = False) -> str:
    """A text with units that stand in brackets behind their numbers written without, and words that are no unit there left out.

    Args:
        text: What a completion says, or a reference answer.
        is_unit: Whether words are a unit that can be compared.
        alone: Leave a text as it is in which words would be left out behind more than one number: it is not one answer.

    Example:
        >>> [out_of_brackets(text, {"km"}.__contains__) for text in ("9 (apples)", "5 (km)", "3 (mod p)", "2 (x)", "4 (or five)")]
        ['9', '5 km', '3 (mod p)', '2 (x)', '4 (or five)']
    """

    def unit(match: re.Match[str]) -> str | None:
        number, words = match["number"], match["unit"]
        letters = max((len(word) for word in re.findall("[A-Za-z]+", words)), default=3)
        if LARGE.match(words) or (is_unit(words) and (letters > 2 or match["gap"])):
            return f"{number} {words}"
        # What follows the number otherwise, and factors, as in 2(ab), stay.
        return None if OTHERWISE.match(words) or NO_UNIT.search(words) or letters < 3 else number

    matches = list(BRACKETS.finditer(text))
    if alone and len(matches) > 1 and any(unit(match) in (None, match["number"]) for match in matches):
        return text
    return BRACKETS.sub(lambda match: unit(match) or match[0], text)


def is_bound(text: str) -> bool:
    """Whether a text answers with a bound and no number.

    Example:
        >>> is_bound("The answer is at least 18."), is_bound("She needs at least 18 eggs.")
        (True, False)
    """
    boxes = BOX.findall(text)
    mark = re.compile(r"\\(?:boxed|fbox)" if boxes else r"\d")
    said = _plain(next((part for part in reversed(SENTENCE.split(text)) if mark.search(part)), ""))
    if IS_BOUND.search(said) and not THERE_IS.search(said):
        return True
    if boxes:
        said = _plain(boxes[-1])
        return bool(ONLY_BOUND.match(said) or AND_MORE.search(said))
    beyond = BEYOND.search(said)
    return bool(ONLY_BOUND.match(said) or AND_MORE.search(said) or (beyond and not NO_BOUND.search(said[: beyond.start()])))


def _plain(text: str) -> str:
    """A sentence without LaTeX, and # for each number."""
    return " ".join(MACRO.sub(" ", NUMBER.sub("#", EXPONENT.sub("", text))).split())


def without_remark(text: str) -> str:
    """A text without the remark in brackets behind its answer, unless that says the answer once more, or another one.

    Example:
        >>> without_remark("18 dollars (9 eggs at $2)"), without_remark("12 (or 13)")
        ('18 dollars', '12 (or 13)')
    """
    match = REMARK.search(text)
    if match is None or OTHERWISE.match(match["remark"]) or not re.search(r"[A-Za-z%]|\d\D+\d", match["remark"]):
        return text
    return text[: match.end("stated")]
