"""A penalty for saying the same again, by repeated n-grams of words.

    -(1 - distinct n-grams / n-grams)

as in open-r1 (github.com/huggingface/open-r1, `repetition_penalty`), after the n-gram penalty of Yeo et al. 2025 (arXiv
2502.03373, appendix C.2), which goes to single tokens and not to the completion.
"""

from collections.abc import Sequence

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards.base import RewardFunction
from hybrid_lightning.types import Prompt


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
