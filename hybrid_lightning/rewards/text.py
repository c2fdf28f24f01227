"""The part of a completion that counts as its answer.

The answer as the very same text.

The form of a completion, whatever it says.

A penalty for saying the same again, by repeated n-grams of words.

    -(1 - distinct n-grams / n-grams)

as in open-r1 (github.com/huggingface/open-r1, `repetition_penalty`), after the n-gram penalty of Yeo et al. 2025 (arXiv
2502.03373, appendix C.2), which goes to single tokens and not to the completion.
"""

import re
from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.types import Completion, Prompt


def compile_pattern(pattern: str, groups: int | None = None) -> re.Pattern[str]:
    """Compile a regular expression in which `.` also matches line breaks.

    Args:
        pattern: The regular expression.
        groups: How many groups it must have; None for any number.

    Raises:
        ConfigError: If it is none, or has another number of groups.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}; correct it") from error
    if groups is not None and compiled.groups != groups:
        raise ConfigError(
            f"pattern={pattern!r} has {compiled.groups} groups instead of {groups}: put the answer, and only that, in ( ), and "
            "write other groups as (?: )"
        )
    return compiled


def extract(pattern: re.Pattern[str] | None, completion: str) -> str | None:
    """Take the answer out of a completion.

    Args:
        pattern: With one group; the last match counts. None: the whole completion is the answer.
        completion: The text.

    Returns:
        The group of the last match, None if there is no match.
    """
    if pattern is None:
        return completion
    matches = [match.group(1) for match in pattern.finditer(completion)]
    return matches[-1] if matches else None


def after_thinking(completion: str) -> str:
    """What a completion says after its reasoning in `<think> </think>`; reasoning that has no end is no answer.

    A prompt may have opened the reasoning already (`Completion.thinking`).

    Example:
        >>> after_thinking("<think>5? No.</think>6"), after_thinking("<think>5?"), after_thinking("6")
        ('6', '', '6')
    """
    if getattr(completion, "thinking", False) and "</think>" not in completion:
        return ""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def reference_answer(reward: str, prompt: Prompt) -> str:
    """The answer to compare with.

    Raises:
        RewardError: If the prompt has none.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise RewardError(
            f"reward {reward} needs a reference answer, but {prompt.source or 'a prompt'} row {prompt.index} has none: set the "
            "answer_column of the data source, or take a reward that needs no answer"
        )
    return prompt.answer


def token_counts(reward: str, completions: Sequence[str]) -> list[int]:
    """Tokens of each completion, of B; the stop token counts.

    Raises:
        RewardError: If a completion is a plain string.
    """
    for completion in completions:
        if not isinstance(completion, Completion):
            raise RewardError(
                f"{reward}: completions are plain strings, whose tokens are not known: give those of a rollout, or make them "
                "Completion(text, num_tokens, finished)"
            )
    return [completion.num_tokens for completion in completions if isinstance(completion, Completion)]


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


class FormatReward(RewardFunction):
    r"""1.0 if a regular expression is found in the completion, else 0.0.

    A policy finds the cheapest way to earn this, so give it a small weight beside a reward for correctness, and anchor the
    pattern: `\A<think>.+</think>\s*\S` rather than `</think>`. One pair of tags and then another:
    `\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z`.

    Args:
        pattern: Regular expression, searched anywhere in the completion; `.` also matches line breaks.
        name: What it is logged as; None for `format_reward`.

    Example:
        >>> FormatReward(r"\A<think>.+</think>")(["<think>2+2</think>4", "4"], [Prompt(text="?")] * 2)
        [1.0, 0.0]
    """

    measures_correctness = False

    def __init__(self, pattern: str, name: str | None = None) -> None:
        self.pattern = compile_pattern(pattern)
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Search each completion, of B."""
        return [float(self.pattern.search(completion) is not None) for completion in completions]


class RepetitionPenalty(RewardFunction):
    """From 0 for a completion without repeated n-grams down to nearly -1 for one that says nothing else.

    For a `WeightedSum`, beside a reward for correctness. Words are what stands between spaces, whatever their case; text of a
    language that is written without spaces is one word, and no repetition is found in it.

    Args:
        ngram_words: Words of an n-gram. Solutions in which formulas recur want longer ones than the 3 of open-r1.
        name: What it is logged as; None for `repetition_penalty`.

    Raises:
        ConfigError: If an n-gram has no word.

    Example:
        >>> RepetitionPenalty(ngram_words=2)(["a b c d", "so so so so", "so"], [Prompt(text="?")] * 3)
        [0.0, -0.6666666666666667, 0.0]
    """

    measures_correctness = False

    def __init__(self, ngram_words: int = 3, name: str | None = None) -> None:
        if ngram_words < 1:
            raise ConfigError(f"RepetitionPenalty: ngram_words={ngram_words}: give at least 1")
        self.ngram_words = ngram_words
        self._name = name

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Penalty of each completion, of B."""
        return [self._penalty(completion.lower().split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.ngram_words]) for start in range(len(words) - self.ngram_words + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0
