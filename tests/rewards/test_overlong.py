import pickle
from copy import deepcopy

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ExactMatch, OverlongPenalty, RewardBySet, WeightedSum, evaluate_reward
from hybrid_lightning.types import Completion, Prompt


def completions(*lengths):
    return [Completion("12", length, True) for length in lengths]


def test_it_falls_from_0_to_minus_1_over_the_buffer():
    values = OverlongPenalty(max_tokens=20, buffer_tokens=4)(completions(0, 1, 15, 16, 17, 18, 19, 20, 21, 99), [])
    assert values == [0, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


@pytest.mark.parametrize("sizes", [(100, 20), (8, 8), (7, 1), (20480, 4096)])
def test_it_is_trls(sizes):
    rewards = pytest.importorskip("trl.rewards", reason="parity needs trl")
    limit, buffer = sizes
    lengths = [0, 1, limit - buffer, limit - buffer + 1, limit - 1, limit, limit + 1]
    theirs = rewards.get_soft_overlong_punishment(limit, buffer)(completion_ids=[[0] * length for length in lengths])
    assert OverlongPenalty(limit, buffer)(completions(*lengths), []) == pytest.approx(theirs, abs=1e-12)


def test_it_adds_to_a_reward_for_correctness():
    reward = WeightedSum([ExactMatch(), OverlongPenalty(10, 4)], weights=[1.0, 0.5])
    result = evaluate_reward(reward, completions(5, 8), [Prompt(text="?", answer="12")] * 2)
    assert result.total.tolist() == [1.0, 0.75] and result.correct.tolist() == [True, True]
    assert result.parts["overlong_penalty"].tolist() == [0.0, -0.5]
    assert result.weights == {"exact_match": 1.0, "overlong_penalty": 0.5}


def test_plain_strings_have_no_tokens():
    with pytest.raises(RewardError, match=r"completions are plain strings.*Completion\(text, num_tokens, finished\)"):
        evaluate_reward(OverlongPenalty(10, 4), ["12"], [Prompt(text="?")])


@pytest.mark.parametrize("sizes", [(10, 0), (10, 11), (10, -1), (0, 1)])
def test_a_buffer_outside_of_the_limit_is_refused(sizes):
    with pytest.raises(ConfigError, match=r"buffer_tokens=.* must be from 1 to max_tokens=.*; set"):
        OverlongPenalty(*sizes)


def test_a_penalty_that_the_sampler_never_reaches_is_refused():
    penalty = OverlongPenalty(max_tokens=20, buffer_tokens=4)
    penalty.check_length(17)
    for reward in (penalty, RewardBySet({"long": penalty})):
        with pytest.raises(ConfigError, match=r"max_new_tokens=16, but the penalty begins after 16 .* set max_tokens=16"):
            reward.check_length(16)


def test_a_completion_is_a_string_and_survives_copies():
    completion = Completion("12\n", 3, False)
    assert completion == "12\n" and completion.strip() == "12" and {completion: 1}["12\n"] == 1
    for copy in (deepcopy(completion), pickle.loads(pickle.dumps(completion))):
        assert copy == completion and (copy.num_tokens, copy.finished) == (3, False)
