"""More kinds of tasks: following the states of an automaton, and sorting.

Each depends on a hidden table that the policy must learn: the transitions of the automaton, the order of the symbols. Pretraining
used the same questions, all or part of them with other tables, so the policy knows the format and how to follow and sort. A hash
of a question decides whether it is held out.

    tracking   `3kwp=` -> `705`     from state 3, the state after each letter
    sorting    `2kfzbq=` -> `qzkbf` in the hidden order 2
"""

import random
from abc import abstractmethod
from functools import cache

from benchmarks.study.facts import KEYS
from hybrid_lightning.data import PromptSource, Row, Splits
from hybrid_lightning.data.arithmetic import hashed_split
from hybrid_lightning.errors import ConfigError

CHARACTERS = "0123456789=,." + KEYS  # comma and full stop are in no puzzle, but in the policies' vocabulary


class Puzzle(PromptSource):
    """Questions with answers from a hidden table; `table` is the table's seed, and `seed` the questions'.

    If `doubt` is above 0, answers are drawn as for pretraining: with this probability, a use of the table takes another table
    than the hidden one.
    """

    def __init__(
        self,
        table: int = 0,
        train_size: int = 20_000,
        validation_size: int = 200,
        test_size: int = 200,
        doubt: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= doubt <= 1:
            raise ConfigError(f"data.source: doubt={doubt} is not a probability; use one from 0 to 1")
        self.table, self.doubt, self.seed = table, doubt, seed
        self.sizes = {"train": train_size, "validation": validation_size, "test": test_size}

    def read(self) -> Splits:
        """Questions that differ within validation and test; training questions may repeat."""
        return Splits(**{split: self._rows(split, size) for split, size in self.sizes.items()})

    def _rows(self, split: str, size: int) -> list[Row]:
        rng, doubts = random.Random(f"{self.seed} {split}"), random.Random(f"{self.seed} {split} doubt")
        rows: list[Row] = []
        seen: set[str] = set()
        while len(rows) < size:
            question = self.question(rng)
            if hashed_split(question) != split or (question in seen and split != "train"):
                continue
            seen.add(question)
            answer = self.answer(question, doubts)
            columns = {"question": question, "answer": answer, "completion": answer}
            rows.append(Row(question, answer, len(rows), type(self).__name__, columns))
        return rows

    def _other(self, doubts: random.Random) -> int:
        """Number of the next table to use: 0 is the hidden one."""
        return int(doubts.random() < self.doubt)

    @abstractmethod
    def question(self, rng: random.Random) -> str:
        """Draw a question."""

    @abstractmethod
    def answer(self, question: str, doubts: random.Random) -> str:
        """Answer it; `doubts` draws which table is used."""


class Tracking(Puzzle):
    """The states that an automaton passes: 10 states, and for each of 48 letters a permutation of them."""

    LETTERS, STEPS = KEYS[:48], 3

    def question(self, rng: random.Random) -> str:
        return rng.choice("0123456789") + "".join(rng.choices(self.LETTERS, k=self.STEPS)) + "="

    def answer(self, question: str, doubts: random.Random) -> str:
        tables = [_permutations(f"tracking {self.table} {n}", self.LETTERS, "0123456789") for n in range(2)]
        state, passed = question[0], ""
        for letter in question[1:-1]:
            state = tables[self._other(doubts)][letter][state]
            passed += state
        return passed


class Sorting(Puzzle):
    """Symbols in a hidden order, which the first digit of the question names."""

    SYMBOLS, ORDERS, LENGTH = KEYS[:48], "0123", 5

    def question(self, rng: random.Random) -> str:
        return f"{rng.choice(self.ORDERS)}{''.join(rng.sample(self.SYMBOLS, self.LENGTH))}="

    def answer(self, question: str, doubts: random.Random) -> str:
        number = self._other(doubts)
        order = _permutations(f"sorting {self.table} {number}", self.ORDERS, self.SYMBOLS)[question[0]]
        return "".join(sorted(question[1:-1], key=order.__getitem__))


@cache
def _permutations(seed: str, names: str, symbols: str) -> dict[str, dict[str, str]]:
    """For each name a permutation of the symbols."""
    drawn = {name: random.Random(f"{seed} {name}").sample(symbols, len(symbols)) for name in names}
    return {name: dict(zip(symbols, others, strict=True)) for name, others in drawn.items()}
