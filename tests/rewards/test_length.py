"""Rewards of the length: a penalty at the limit, and cosine and group rewards over one for correctness."""

import math
from unittest.mock import Mock

import pytest

from hybrid_lightning.errors import ConfigError, RewardError
from hybrid_lightning.rewards import ExactMatch, FormatReward, RewardBySet, RewardFunction, WeightedSum, evaluate_reward
from hybrid_lightning.rewards.length import CosineLength, GroupLength, OverlongPenalty
from hybrid_lightning.types import Completion, Prompt

PROMPT = Prompt(text="?", answer="12")


def completions(*pairs):
    return [Completion(text, length, True) for text, length in pairs]


class Counting(RewardFunction):
    """Right if the text is 12; counts how often it is asked."""

    calls = 0
    overlaps = Mock(return_value=4)
    turn_rewards = Mock(return_value=[1.0])

    def __call__(self, completions, prompts):
        self.calls += 1
        return [float(text == "12") for text in completions]


def test_the_cosine_runs_from_shortest_to_longest_as_in_the_paper():
    texts = completions(("12", 0), ("12", 50), ("12", 100), ("13", 0), ("13", 50), ("13", 100), ("12", 130))
    result = evaluate_reward(CosineLength(ExactMatch(), max_tokens=100), texts, [PROMPT] * 7)
    assert result.total.tolist() == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5, 0.5])
    assert result.correct.tolist() == [True, True, True, False, False, False, True]
    assert result.weights == {"exact_match": 0.0, "cosine_length": 1.0}
    # CosFn(t, T, low, high) = low + (high - low) (1 + cos(t pi / T)) / 2
    reward = CosineLength(ExactMatch(), 80, 2.0, 1.0, -10.0, 0.0, at_limit=-10.0)
    values = evaluate_reward(reward, completions(("12", 20), ("13", 20), ("12", 80)), [PROMPT] * 3).total.tolist()
    share = (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([1 + share, -10 * share, -10.0])


def test_in_a_group_the_shorter_right_one_earns_more():
    other = Prompt(text="?", answer="12", index=1)
    texts = completions(("12", 10), ("12", 20), ("12", 30), ("13", 10), ("13", 30), ("12", 7), ("12", 7))
    prompts = [PROMPT] * 5 + [other] * 2
    result = evaluate_reward(GroupLength(ExactMatch(), weight=0.5), texts, prompts)
    assert result.parts["group_length"].tolist() == [0.5, 0.0, -0.5, 0.0, -0.5, 0.0, 0.0]
    assert result.total.tolist() == [1.25, 1.0, 0.75, 0.0, -0.25, 1.0, 1.0]


@pytest.mark.parametrize("wrap", [lambda reward: CosineLength(reward, 100), GroupLength])
def test_nothing_is_scored_twice_and_the_right_batch_is_remembered(wrap):
    for refused in (FormatReward("x"), WeightedSum([ExactMatch()])):
        with pytest.raises(ConfigError, match="must be one reward that measures correctness"):
            wrap(refused)
    inner = Counting()
    reward = WeightedSum([wrap(inner), FormatReward(r"\d")])
    whole = reward.terms()[0][0]  # a batch is needed, so that nothing is scored as it arrives, nor paid by turn
    assert whole.name == "counting" and whole.overlaps(PROMPT) == 0 and whole.turn_rewards("12", PROMPT) is None
    for text, right in (("12", True), ("13", False)):
        result = evaluate_reward(reward, completions((text, 10)), [PROMPT])
        assert result.correct.tolist() == [right]
        assert list(result.parts) == ["counting", reward.terms()[1][0].name, "format_reward"]
    assert inner.calls == 2


# ---- the penalty at the limit


def of_lengths(*lengths):
    return completions(*(("12", length) for length in lengths))


def test_it_falls_from_0_to_minus_1_over_the_buffer_and_adds_to_a_reward_for_correctness():
    values = OverlongPenalty(max_tokens=20, buffer_tokens=4)(of_lengths(0, 1, 15, 16, 17, 18, 19, 20, 21, 99), [])
    assert values == [0, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    reward = WeightedSum([ExactMatch(), OverlongPenalty(10, 4)], weights=[1.0, 0.5])
    result = evaluate_reward(reward, of_lengths(5, 8), [PROMPT] * 2)
    assert result.total.tolist() == [1.0, 0.75] and result.correct.tolist() == [True, True]
    message = r"OverlongPenalty: completions are plain strings.*Completion\(text, num_tokens, finished\)"
    with pytest.raises(RewardError, match=message):
        evaluate_reward(reward, ["12"], [PROMPT])


def test_it_is_trls():
    rewards = pytest.importorskip("trl.rewards", reason="parity needs trl")
    for limit, buffer in ((100, 20), (8, 8), (7, 1), (20480, 4096)):
        lengths = [0, 1, limit - buffer, limit - buffer + 1, limit - 1, limit, limit + 1]
        theirs = rewards.get_soft_overlong_punishment(limit, buffer)(completion_ids=[[0] * length for length in lengths])
        assert OverlongPenalty(limit, buffer)(of_lengths(*lengths), []) == pytest.approx(theirs, abs=1e-12)


def test_bad_arguments_and_a_penalty_that_the_sampler_never_reaches_are_refused():
    for build, message in (
        (lambda: OverlongPenalty(10, 11), r"buffer_tokens=11 must be from 1 to max_tokens=10; set"),
        (lambda: OverlongPenalty(20, 4).check_length(16), r"max_new_tokens=16, but .* begins after 16 .* set max_tokens=16"),
        (lambda: RewardBySet({"long": OverlongPenalty(20, 4)}).check_length(16), "the penalty begins after 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            build()
    OverlongPenalty(20, 4).check_length(17)
