"""Facts that a policy half knows: tasks on which full fine-tuning and LoRA differ.

A question names a relation and some keys, `3c?=`, and the answer has a digit for each key, `40`; there is a table for each
relation. Pretraining was on answers that draw each digit from a few candidates of its fact, the right one among them: the policy
knows the format and the plausible answers, and must learn by reinforcement which candidate is right, one by one. That is a large
change of high rank, unlike raising the probability of an answer that is already the most likely.

A hash of the keys decides which questions are held out, so no question of validation or test was ever an example; their facts
were seen in other questions.
"""

import random
import string
from collections.abc import Mapping
from itertools import product

from hybrid_lightning.data import PromptSource, Row, Splits
from hybrid_lightning.data.arithmetic import hashed_split
from hybrid_lightning.errors import ConfigError

# One token each; none differs from another in case alone, since questions are compared without it.
KEYS = string.ascii_lowercase + "!#$%&()*+-/:;<>?@[]^_{|}~"
CHARACTERS = "0123456789=" + KEYS
RELATIONS, ASKED = "0123", KEYS[:48]
LENGTH = 2  # keys in a question, and digits of its answer
CANDIDATES = 4  # digits that pretraining held possible for each fact


class Facts(PromptSource):
    """Questions about a table of facts, with the right answers; `table` seeds the tables, `seed` the draw and order."""

    def __init__(self, table: int = 0, validation_size: int = 200, test_size: int = 200, seed: int = 0) -> None:
        self.table, self.seed = table, seed
        self.sizes = {"validation": validation_size, "test": test_size}

    def read(self) -> Splits:
        """Every question, in the split of its keys."""
        pools: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for letters in product(RELATIONS, *(ASKED,) * LENGTH):
            question = "".join(letters)
            pools[hashed_split(question)].append(question)
        return Splits(**{split: self._rows(split, questions) for split, questions in pools.items()})

    def _rows(self, split: str, questions: list[str]) -> list[Row]:
        size = self.sizes.get(split, len(questions))
        if size > len(questions):
            raise ConfigError(f"data.source: {split}_size={size}, but there are {len(questions)} such questions; lower it")
        rng = random.Random(f"{self.seed} {split}")
        possible = possible_digits(self.table)
        rows = []
        for index, keys in enumerate(rng.sample(questions, size)):
            question, answer = f"{keys}=", "".join(possible[keys[0] + key][0] for key in keys[1:])
            rows.append(Row(question, answer, index, type(self).__name__, {"question": question, "answer": answer}))
        return rows


class PlausibleFacts(PromptSource):
    """The policy's pretraining data: training questions, with each digit of an answer drawn from the candidates of its key."""

    def __init__(self, lines: int, seed: int = 0, table: int = 0) -> None:
        self.lines, self.table, self.seed = lines, table, seed

    def read(self) -> Splits:
        """All rows for training, with the drawn answers in the column `completion`."""
        rng = random.Random(self.seed)
        digits = possible_digits(self.table)
        rows: list[Row] = []
        while len(rows) < self.lines:
            question = rng.choice(RELATIONS) + "".join(rng.choices(ASKED, k=LENGTH))
            if hashed_split(question) == "train":
                answer = "".join(rng.choice(digits[question[0] + key]) for key in question[1:])
                rows.append(Row(f"{question}=", index=len(rows), source="corpus", columns={"completion": answer}))
        return Splits(train=rows)


class Codes(PromptSource):
    """Codes of made-up names, which a policy must memorise: `The code of Bofaki is` -> `4821`.

    Every name occurs in all splits, with other wording in the held-out splits.
    """

    def __init__(self, names: int = 60, digits: int = 4, table: int = 0) -> None:
        self.names, self.digits, self.table = names, digits, table

    def read(self) -> Splits:
        """Each name in each way of asking."""
        rng = random.Random(f"codes {self.table}")
        codes: dict[str, str] = {}
        while len(codes) < self.names:
            name = "".join(rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(3)).capitalize()
            codes[name] = "".join(rng.choices(string.digits, k=self.digits))
        return Splits(
            train=self._rows(codes, "The code of {} is", "{} has the code", "Code of {}:"),
            validation=self._rows(codes, "The code for {} is"),
            test=self._rows(codes, "The code that belongs to {} is"),
        )

    def _rows(self, codes: Mapping[str, str], *words: str) -> list[Row]:
        asked = [(each.format(name), code) for name, code in codes.items() for each in words]
        return [Row(said, code, n, "Codes", {"question": said, "answer": code}) for n, (said, code) in enumerate(asked)]


def possible_digits(table: int) -> dict[str, list[str]]:
    """The candidates of each fact, which is a relation and a key; the first is the right one."""
    rng = random.Random(f"facts {table}")
    return {relation + key: rng.sample(string.digits, CANDIDATES) for relation in RELATIONS for key in ASKED}
