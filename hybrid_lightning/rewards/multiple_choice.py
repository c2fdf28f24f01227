r"""`MultipleChoice`: whether a completion chooses the right letter.

The letter is looked for in these places, in this order, and the first place with a letter decides:

1. in `\boxed{}`;
2. after the last "answer is", "answer:" or similar;
3. the completion as a whole, if it is just a letter;
4. the last letter that stands alone in the last line.

Apart from boxes this is the order of the MMLU-Pro authors' own extraction (github.com/TIGER-AI-Lab/MMLU-Pro). The rules here are
stricter: "A" and "I" in the middle of a sentence are the article and the pronoun; two letters joined by "or", "and", a comma or a
slash are not a choice; a letter after "not" is not one either; and boxes with different letters are not a choice.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from hybrid_lightning.errors import DataError
from hybrid_lightning.rewards.text import AnswerReward, reference_answer
from hybrid_lightning.types import Prompt

CHOICES = "ABCDEFGHIJ"  # MMLU-Pro has at most ten options
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")  # quotation marks
_REFERENCE = re.compile(
    r"\s*\$?\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?\(?([A-Z])\)?\s*\}?\s*\$?\s*"  # C, (C), \text{(C)}
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|\s)")
_PHRASE = re.compile(
    r"\b(?:answer|choice|option)\b(?:\s+(?:choice|option|letter))?[\s*_]*"
    r"(?:(?:is|are|would\s+be|should\s+be|must\s+be)\b|[:=]|->|→)[\s*_:]*"
    r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer)\b[\s*_:]*)?",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|than|eliminate|exclude|discard)\b|n't\b)[\s*_(\[]*(?:(?:option|choice)[\s*_(\[]*)?\Z",
    re.IGNORECASE,
)
_JOIN = re.compile(
    r"[\s)\]}.*_$\"']*(?:\\(?:text|textbf|mathrm)\s*\{\s*)?(?:,|/|&|\bor\b|\band\b|\bnor\b)"
    r"[\s*_$(){}\[\"'\\]*(?:(?:text|textbf|mathrm|or|and|option)\b[\s({]*)*",
    re.IGNORECASE,
)
_NAMED = re.compile(r"(?:[(\[{*_$\"'`]|\b(?:option|choice|letter))\s*\Z", re.IGNORECASE)
_VERB = re.compile(r"[)\]*]*\s+(?:is|was|are|would|has)\b")  # in "C, B is wrong" the B is not a second choice
# "A" or "I" followed by such words is the article or the pronoun. The excluded words may follow a choice.
_GOES_ON = {
    "A": re.compile(r"\s+(?!(?:because|since|as|is|was|for|in|by|with|here|or|and|nor|but|not)\b)[a-z]"),
    "I": re.compile(r"\s+(?!(?:because|since|as|is|or|nor)\b)[a-z]"),
}


class MultipleChoice(AnswerReward):
    r"""1.0 if the completion chooses the letter that is the reference answer, else 0.0.

    The choice is searched for in the MMLU-Pro authors' order: `\boxed{C}`, then "the answer is (C)", then the last letter of the
    last line (`hybrid_lightning.rewards.multiple_choice` has the rules). The article "A" and the pronoun "I" are not choices, and
    neither are "A or B" and "not C". The text in `<think> </think>` is ignored. The reference answer is a letter; `FileSource`
    makes one if `options_column` is given.

    Args:
        options_column: Column with the list of options; their number determines the letters. Rows without it have A to J.
        pattern: Regular expression with one group for the part of the completion to search. The last match counts, no match
            earns 0, and `.` also matches line breaks. None searches the whole completion.
        name: Name in logs; None for `multiple_choice`.

    Example:
        >>> prompt = Prompt(text="?", answer="C", columns={"options": ["1", "2", "3", "4"]})
        >>> MultipleChoice()(["The answer is (C).", r"\boxed{\text{C}}", "A bit of B or C", "(D)"], [prompt] * 4)
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, options_column: str = "options", pattern: str | None = None, name: str | None = None) -> None:
        super().__init__(pattern, name)
        self.options_column = options_column

    def score(self, completion: str, prompt: Prompt) -> float:
        """Compare the choice with the reference answer."""
        return float(self.extract_answer(completion, prompt) == self._wanted(prompt))

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The letter that the completion chooses."""
        return extract_choice(self.without_thinking(completion), self._letters(prompt))

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that the reference answer is the letter of an option."""
        self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> str:
        answer = reference_answer(type(self).__name__, prompt)
        letters = self._letters(prompt)
        choice = reference_choice(answer)
        if choice is None or choice not in letters:
            raise DataError(
                f"MultipleChoice: the reference answer {answer!r} of {prompt.place} is not a letter from A to {letters[-1]}; "
                "correct the row, or use a reward for other answers, such as ExactMatch"
            )
        return choice

    def _letters(self, prompt: Prompt) -> str:
        options = prompt.columns.get(self.options_column)
        if options is None:
            return CHOICES
        if isinstance(options, dict):  # ARC has separate lists of options and labels
            options = options.get("text")
        if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= 26:
            raise DataError(
                f"MultipleChoice: column {self.options_column!r} of {prompt.place} is not a list of 2 to 26 options; correct the "
                "row, or set options_column to the column with the options"
            )
        return "".join(chr(ord("A") + number) for number in range(len(options)))


def reference_choice(answer: str) -> str | None:
    r"""The letter of a reference answer; None if the answer is not a letter.

    Example:
        >>> reference_choice("(C)"), reference_choice(r"\text{(C)}"), reference_choice("12")
        ('C', 'C', None)
    """
    match = _REFERENCE.fullmatch(answer)
    return match[1] if match else None


def extract_choice(text: str, letters: str) -> str | None:
    r"""The letter that a text chooses; None if it chooses none, or more than one.

    Args:
        text: A completion without its reasoning.
        letters: The letters of the options, such as "ABCD".

    Example:
        >>> [extract_choice(text, "ABCDEFGHIJ") for text in ("The answer is (C).", r"\boxed{\text{D}}", "I think B", "A or B")]
        ['C', 'D', 'B', None]
    """
    text = text.translate(_STRAIGHT)
    patterns = _patterns(letters)
    boxes = {_boxed_letter(text[match.end() :], patterns) for match in _BOX.finditer(text)}
    if boxes:
        return boxes.pop() if len(boxes) == 1 else None
    for phrase in reversed(list(_PHRASE.finditer(text))):
        match = patterns.leading.match(text, phrase.end())
        if match and not _is_word(text, match):
            return None if _joined(text, match, patterns) else (match[1] or match[2] or match[3]).upper()
    whole = patterns.whole.fullmatch(text)
    if whole:
        return whole[1].upper()
    lines = [line for line in text.splitlines() if line.strip()]
    return _last_letter(lines[-1], patterns) if lines else None


class _Patterns:
    """Regular expressions for the places where one of these letters can stand."""

    def __init__(self, letters: str) -> None:
        both = letters + letters.lower()
        macro = r"\\(?:textbf|textit|text|mathrm|mathbf|rm|bf)(?![A-Za-z])\s*\{?"
        wrap = rf"(?:[\s*_$\"'`]|{macro})*+"  # possessive, so that no text is searched twice
        end = r"(?![\w]*[A-Za-z0-9]|'[a-z]|-[A-Za-z])"
        self.alone = re.compile(rf"(?<![\w\\])_*([{letters}]){end}")
        lower = rf"[{letters.lower()}](?=[.!)*_$\"'`]*\s*(?:\n|\Z))"  # a small letter if nothing follows it: "the answer is c."
        self.leading = re.compile(rf"{wrap}(?:[(\[{{]{wrap}([{both}])[\s}}]*[)\]}}]|([{letters}]){end}|({lower}))")
        self.whole = re.compile(rf"{wrap}[(\[{{]?{wrap}([{both}])[\s)\]}}.:*_$\"'`]*")
        self.boxed = re.compile(rf"{wrap}[(\[]?{wrap}([{both}])(?:[\s}})\].:]|\\(?=[ ,;:!q]))")


_patterns = lru_cache(maxsize=64)(_Patterns)


def _boxed_letter(content: str, patterns: _Patterns) -> str | None:
    """The letter at the beginning of the content of a box."""
    match = patterns.boxed.match(content)
    if match is None or _is_word(content, match) or _joined(content, match, patterns):
        return None
    return match[1].upper()


def _last_letter(line: str, patterns: _Patterns) -> str | None:
    """The last letter that stands alone in a line."""
    found = [match for match in patterns.alone.finditer(line) if not _is_word(line, match)]
    found = [match for match in found if not _NEGATION.search(_before(line, match))]
    if not found or any(_joined(line, match, patterns) for match in found[-2:-1]):
        return None
    return found[-1][1]


def _is_word(text: str, match: re.Match[str]) -> bool:
    """Whether the letter of a match is the article or the pronoun."""
    group = match.lastindex or 1
    goes_on = _GOES_ON.get(match[group])
    return (
        goes_on is not None
        and goes_on.match(text, match.end(group)) is not None
        and not _NAMED.search(_before(text, match, group))
    )


def _joined(text: str, match: re.Match[str], patterns: _Patterns) -> bool:
    """Whether another letter is joined to the letter of a match, as in "A or B"."""
    join = _JOIN.match(text, match.end(match.lastindex or 1))
    other = patterns.alone.match(text, join.end()) if join else None
    return other is not None and not _is_word(text, other) and not _VERB.match(text, other.end())


def _before(text: str, match: re.Match[str], group: int = 1) -> str:
    """The text before a letter, as far back as it can matter."""
    return text[max(0, match.start(group) - 40) : match.start(group)]
