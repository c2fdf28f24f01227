"""Rewards that read only the text of a completion, and the functions that extract answers for all rewards.

- `ExactMatch`: whether the answer is the same text as the reference answer.
- `FormatReward`: whether the completion has a given form, whatever its content.
- `RepetitionPenalty`: -(1 - distinct n-grams / n-grams) over n-grams of words, as in open-r1
  (github.com/huggingface/open-r1, `repetition_penalty`). It follows the n-gram penalty of Yeo et al. 2025 (arXiv 2502.03373,
  appendix C.2), which penalizes single tokens instead of the whole completion.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.shared.user_code import compile_pattern
from hybrid_lightning.types import Prompt


class AnswerReward(RewardFunction):
    """Base of rewards that extract an answer from a completion and judge it, one completion at a time.

    Args:
        pattern: Regular expression with one group for the answer. The last match counts, no match earns 0, and `.` also
            matches line breaks. None takes the whole completion.
        name: Name in logs; None for the class name in snake_case.

    Raises:
        ConfigError: If `pattern` is not a regular expression with one group.
    """

    def __init__(self, pattern: str | None, name: str | None) -> None:
        self.pattern = None if pattern is None else compile_pattern(pattern, groups=1)
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Score each of B completions."""
        return [self.score(completion, prompt) for completion, prompt in zip(completions, prompts, strict=True)]

    @abstractmethod
    def score(self, completion: str, prompt: Prompt) -> float:
        """The reward of one completion."""

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The text that the pattern finds, without surrounding white space."""
        answer = extract_match(self.pattern, completion)
        return None if answer is None else answer.strip() or None

    def without_thinking(self, completion: str) -> str:
        """The part of a completion after the reasoning, which the pattern searches; empty if there is none."""
        return extract_match(self.pattern, after_thinking(completion)) or ""


class ExactMatch(AnswerReward):
    r"""1.0 if the completion is the reference answer, else 0.0.

    White space around the answer is ignored, and any white space inside it counts as one space. Everything else must match: "12."
    is not "12". Without a `pattern` the whole completion is the answer. If a policy continues after its answer, set a stop string
    in the sampler, or a pattern such as `\A\s*([^\n]*)` for the first line.

    Args:
        pattern: Regular expression with one group for the answer. The last match counts, no match earns 0, and `.` also
            matches line breaks. None takes the whole completion.
        ignore_case: Whether "Yes" equals "yes".
        name: Name in logs; None for `exact_match`.

    Example:
        >>> ExactMatch()([" 12\n", "12."], [Prompt(text="7+5=", answer="12")] * 2)
        [1.0, 0.0]
    """

    def __init__(self, pattern: str | None = None, ignore_case: bool = False, name: str | None = None) -> None:
        super().__init__(pattern, name)
        self.ignore_case = ignore_case

    def extract_answer(self, completion: str, prompt: Prompt) -> str | None:
        """The text to compare with the reference answer."""
        answer = super().extract_answer(completion, prompt)
        return None if answer is None else self._normalize(answer)

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that there is a reference answer."""
        reference_answer(type(self).__name__, prompt)

    def score(self, completion: str, prompt: Prompt) -> float:
        """Compare the answer with the reference answer."""
        wanted = self._normalize(reference_answer(type(self).__name__, prompt))
        return float(self.extract_answer(completion, prompt) == wanted)

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class FormatReward(RewardFunction):
    r"""1.0 if a regular expression is found in the completion, else 0.0.

    Some chat templates open `<think>` in the prompt. The pattern may then match with or without this tag before the completion,
    so that one pattern suits all templates.

    A policy finds the cheapest way to earn this, so give it a small weight next to a reward for correctness, and anchor the
    pattern: `\A<think>.+</think>\s*\S` rather than `</think>`. For one pair of tags followed by another:
    `\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z`.

    Args:
        pattern: Regular expression, searched anywhere in the completion; `.` also matches line breaks.
        name: Name in logs; None for `format_reward`.

    Example:
        >>> FormatReward(r"\A<think>.+</think>")(["<think>2+2</think>4", "4"], [Prompt(text="?")] * 2)
        [1.0, 0.0]
    """

    measures_correctness = False

    def __init__(self, pattern: str, name: str | None = None) -> None:
        self.pattern = compile_pattern(pattern)
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Search each of B completions."""
        return [float(any(map(self.pattern.search, _with_opening(completion)))) for completion in completions]


class RepetitionPenalty(RewardFunction):
    """0 for a completion without repeated n-grams, falling to nearly -1 for a completion that only repeats itself.

    Use it in a `WeightedSum` with a reward for correctness. Words are separated by spaces, and their case is ignored. In a
    language without spaces, a text is one word, so no repetition is found.

    Args:
        ngram_words: Number of words in an n-gram. Solutions with recurring formulas need longer n-grams than open-r1's 3.
        name: Name in logs; None for `repetition_penalty`.

    Example:
        >>> RepetitionPenalty(ngram_words=2)(["a b c d", "so so so so", "so"], [Prompt(text="?")] * 3)
        [0.0, -0.6666666666666667, 0.0]
    """

    measures_correctness = False

    def __init__(self, ngram_words: int = 3, name: str | None = None) -> None:
        self.ngram_words = ngram_words
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """The penalty of each of B completions."""
        return [self._penalty(completion.lower().split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.ngram_words]) for start in range(len(words) - self.ngram_words + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def _with_opening(completion: str) -> list[str]:
    """A completion; if its prompt has opened `<think>`, also with this tag in front, as templates write it."""
    return [completion, *(tag + completion for tag in ("<think>", "<think>\n") if getattr(completion, "thinking", False))]


def extract_match(pattern: re.Pattern[str] | None, completion: str) -> str | None:
    """The group of a pattern in its last match, or None; without a pattern, the whole completion."""
    if pattern is None:
        return completion
    matches = [match.group(1) for match in pattern.finditer(completion)]
    return matches[-1] if matches else None


def after_thinking(completion: str) -> str:
    """The part of a completion after its reasoning in `<think> </think>`; empty if the reasoning does not end.

    The prompt may have opened the reasoning already (`Completion.thinking`).

    Example:
        >>> after_thinking("<think>5? No.</think>6"), after_thinking("<think>5?"), after_thinking("6")
        ('6', '', '6')
    """
    if getattr(completion, "thinking", False) and "</think>" not in completion:
        return ""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def reference_answer(reward: str, prompt: Prompt) -> str:
    """The reference answer of a prompt, for a reward of this name.

    Raises:
        RewardError: If the prompt has no reference answer.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise RewardError(
            f"reward {reward} needs a reference answer, but {prompt.place} has none; set the answer_column of the data source, "
            "or use a reward that needs no answer"
        )
    return prompt.answer
