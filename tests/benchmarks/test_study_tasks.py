"""The problems of the study: facts, puzzles, and the start policies that half know them."""

import pytest
import yaml

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study.facts import Facts, PlausibleFacts, possible_digits
from benchmarks.study.policies import POLICY_OF, RECIPES
from benchmarks.study.pool import HERE
from benchmarks.study.puzzles import Sorting, Tracking
from hybrid_lightning.data.arithmetic import hashed_split
from hybrid_lightning.errors import ConfigError


def test_pretraining_never_saw_a_question_that_is_held_out():
    splits, corpus, digits = Facts(validation_size=10, test_size=10).load(), PlausibleFacts(2000).read().train, possible_digits(0)
    assert not {row.question for row in corpus} & {row.question for row in (*splits.validation, *splits.test)}
    for row in splits.train:
        assert row.answer == "".join(digits[row.question[0] + key][0] for key in row.question[1:-1])
    for row in corpus:  # the right digit is among the digits that it held possible
        facts = [row.question[0] + key for key in row.question[1:-1]]
        assert all(digit in digits[fact] for digit, fact in zip(row.columns["completion"], facts, strict=True))
    with pytest.raises(ConfigError, match=r"data\.source: test_size=9999, but there are .* such questions; lower it"):
        Facts(test_size=9999).load()


@pytest.mark.parametrize("kind", [Tracking, Sorting])
def test_puzzles(kind):
    splits = kind(train_size=300, validation_size=20, test_size=20).read()
    for split, size in (("train", 300), ("validation", 20), ("test", 20)):
        assert [hashed_split(row.question) for row in getattr(splits, split)] == [split] * size
    again, other = kind(train_size=300).read().train, kind(table=1, train_size=300).read().train
    assert [row.answer for row in again] == [row.answer for row in splits.train]
    assert sum(row.answer != before.answer for row, before in zip(other, again, strict=True)) > 290
    doubted = kind(train_size=300, doubt=0.5).read().train
    right = sum(row.answer == before.answer for row, before in zip(doubted, again, strict=True))
    assert 10 < right < 220 and [row.question for row in doubted] == [row.question for row in again]
    with pytest.raises(ConfigError, match="doubt=2 is not a probability; use one from 0 to 1"):
        kind(doubt=2)


def test_what_the_puzzles_ask():
    row = Tracking(train_size=1).read().train[0]
    assert len(row.question) == 5 and len(row.answer) == 3 and row.answer.isdigit()
    ways = {}  # each letter is a function of the state, and never leads two states to one
    for row in Tracking(train_size=3000).read().train:
        for before, letter, after in zip(row.question[0] + row.answer, row.question[1:-1], row.answer, strict=False):
            assert ways.setdefault((before, letter), after) == after
    for each in "abc":
        states = [after for (_, letter), after in ways.items() if letter == each]
        assert len(set(states)) == len(states)


@pytest.mark.parametrize("name", sorted(POLICY_OF))
def test_every_task_has_a_recipe_that_knows_its_characters(name):
    (path,) = (HERE / "tasks").rglob(f"{name}.yaml")
    config = yaml.safe_load(path.read_text())
    policy = config["model"].get("init_args", config["model"])["model"]
    assert policy == "embedded" or policy.endswith(POLICY_OF[name])
    recipe = RECIPES[POLICY_OF[name]]
    rows = recipe.lines(20, 0).read().train
    assert len(rows) == 20 and all(set(row.question) | set(row.columns["completion"]) <= set(recipe.characters) for row in rows)
