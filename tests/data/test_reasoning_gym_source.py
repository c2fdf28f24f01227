import json

import pytest

from hybrid_lightning.data import ReasoningGymSource, problem_key
from hybrid_lightning.errors import ConfigError, DataError

pytest.importorskip("reasoning_gym", reason="the optional extra reasoning-gym is not installed")


def test_splits_are_disjoint_reproducible_and_plain():
    source = ReasoningGymSource("leg_counting", size=20, validation_size=5, test_size=5, seed=3, config={"max_animals": 4})
    splits = source.load()
    assert (len(splits.validation), len(splits.test)) == (5, 5) and len(splits.train) <= 20
    keys = [{problem_key(row.question) for row in part} for part in vars(splits).values()]
    assert not (keys[0] & keys[1] or keys[0] & keys[2])
    assert splits == source.load()
    assert splits != ReasoningGymSource("leg_counting", 20, 5, 5, seed=4, config={"max_animals": 4}).load()
    assert json.loads(json.dumps(splits.train[0].columns)) == splits.train[0].columns


def test_bad_arguments():
    for arguments, message in (
        ({"task": "no_such_task"}, "has no task 'no_such_task'; it has .*leg_counting"),
        ({"task": "leg_counting", "config": {"max_animals": -1}}, "rejects config"),
        ({"task": "leg_counting", "config": {"seed": 1}}, "set the argument seed"),
        ({"task": "leg_counting", "size": 0, "validation_size": 0, "test_size": 0}, "set at least one of them"),
    ):
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            ReasoningGymSource(**arguments).load()
        assert "\n" not in str(caught.value)
