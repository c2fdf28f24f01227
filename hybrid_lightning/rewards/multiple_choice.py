"""The right letter of a multiple-choice question."""

from collections.abc import Sequence

from hybrid_lightning.errors import DataError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.choices import CHOICES, extract_choice, reference_choice
from hybrid_lightning.rewards.extraction import after_thinking, compile_pattern, extract, reference_answer
from hybrid_lightning.types import Prompt


class MultipleChoice(RewardFunction):
    r"""1.0 if the completion chooses the letter that is the reference answer, else 0.0.

    The choice is looked for as MMLU-Pro's authors do: `\boxed{C}`, then "the answer is (C)", then the last letter of the last
    line (`hybrid_lightning.rewards.choices` has the rules). The article "A" and the pronoun "I" are no choices, nor are "A or B"
    and "not C". What stands in `<think> </think>` is not looked at. The reference answer is a letter, as `FileSource` makes it
    where it is told the `options_column`.

    Args:
        options_column: Column with the list of options, whose number says which letters there are; rows that lack it have A to J.
        pattern: Regular expression with one group, the part of the completion that is looked at; the last match counts, no match
            earns nothing, `.` also matches line breaks. None: all of it.
        name: What it is logged as; None for `multiple_choice`.

    Example:
        >>> prompt = Prompt(text="?", answer="C", columns={"options": ["1", "2", "3", "4"]})
        >>> MultipleChoice()(["The answer is (C).", r"\boxed{\text{C}}", "A bit of B or C", "(D)"], [prompt] * 4)
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, options_column: str = "options", pattern: str | None = None, name: str | None = None) -> None:
        self.options_column = options_column
        self.pattern = None if pattern is None else compile_pattern(pattern, groups=1)
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Compare the choice of each completion, of B, with its prompt's answer."""
        return [
            float(self.extract_answer(completion, prompt) == self._wanted(prompt))
            for completion, prompt in zip(completions, prompts, strict=True)
        ]

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The letter that is chosen."""
        text = extract(self.pattern, after_thinking(completion))
        return None if text is None else extract_choice(text, self._letters(prompt))

    def check_prompt(self, prompt: Prompt) -> None:
        """Make sure that the reference answer is the letter of an option."""
        self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> str:
        answer = reference_answer(type(self).__name__, prompt)
        letters = self._letters(prompt)
        choice = reference_choice(answer)
        if choice is None or choice not in letters:
            raise DataError(
                f"MultipleChoice: the reference answer {answer!r} of {prompt.source or 'a prompt'} row {prompt.index} is no "
                f"letter from A to {letters[-1]}; correct the row, or take a reward for other answers, such as ExactMatch"
            )
        return choice

    def _letters(self, prompt: Prompt) -> str:
        options = prompt.columns.get(self.options_column)
        if options is None:
            return CHOICES
        if isinstance(options, dict):  # as ARC has them, beside their labels
            options = options.get("text")
        if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= 26:
            raise DataError(
                f"MultipleChoice: column {self.options_column!r} of {prompt.source or 'a prompt'} row {prompt.index} is no list "
                "of 2 to 26 options; correct the row, or name the column with the options by options_column"
            )
        return "".join(chr(ord("A") + number) for number in range(len(options)))
