"""The answer as the very same text."""

from collections.abc import Sequence

from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.rewards.extraction import compile_pattern, extract, reference_answer
from hybrid_lightning.types import Prompt


class ExactMatch(RewardFunction):
    r"""1.0 if the completion is the reference answer, else 0.0.

    Space around the answer does not count and any space within is like any other; all else does, so "12." is not "12". The whole
    completion is the answer unless `pattern` takes it out, so a policy that goes on after its answer needs a stop string
    (of the sampler) or a pattern such as `\A\s*([^\n]*)` for the first line.

    Args:
        pattern: Regular expression with one group, the answer; the last match counts, no match earns nothing, `.` also matches
            line breaks. None: the whole completion.
        ignore_case: Whether "Yes" is "yes".
        name: What it is logged as; None for `exact_match`.

    Example:
        >>> ExactMatch()([" 12\n", "12."], [Prompt(text="7+5=", answer="12")] * 2)
        [1.0, 0.0]
    """

    def __init__(self, pattern: str | None = None, ignore_case: bool = False, name: str | None = None) -> None:
        self.pattern = None if pattern is None else compile_pattern(pattern, groups=1)
        self.ignore_case = ignore_case
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Compare each completion, of B, with its prompt's answer."""
        return [self._score(completion, prompt) for completion, prompt in zip(completions, prompts, strict=True)]

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """What is compared with the reference answer."""
        answer = extract(self.pattern, completion)
        return None if answer is None else self._normalize(answer) or None

    def check_prompt(self, prompt: Prompt) -> None:
        """Make sure that there is a reference answer."""
        reference_answer(type(self).__name__, prompt)

    def _score(self, completion: str, prompt: Prompt) -> float:
        wanted = self._normalize(reference_answer(type(self).__name__, prompt))
        return float(self.extract_answer(completion, prompt) == wanted)

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
