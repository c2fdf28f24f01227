"""Rewards at the turns for which they are paid."""

import pytest
import torch

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import (
    EpisodeReturn,
    ExactMatch,
    FinalAnswer,
    RewardBySet,
    WeightedSum,
    evaluate_reward,
    rewards_to_go,
)
from hybrid_lightning.types import Completion, Episode, Prompt


def episode(*rewards, turns=None, answer="no"):
    messages = ({"role": "assistant", "content": answer},)
    return Completion(answer, 3, True, episode=Episode(messages, turns or len(rewards), "over", rewards))


def to_go(reward, episodes, turns, counted=None, set_name=""):
    prompts = [Prompt(text="?", answer="yes", set_name=set_name)] * len(episodes)
    rewards = evaluate_reward(reward, episodes, prompts, counted).apply(lambda values: values[None])  # one group
    return rewards, rewards_to_go(reward, episodes, prompts, rewards, turns)


def test_steps_pay_at_their_turns_with_their_weight_and_all_else_at_the_last():
    reward = WeightedSum([EpisodeReturn(), FinalAnswer(ExactMatch(pattern="(.+)"))], [0.5, 2.0])
    # The third has a last message that the environment did not see, and the fourth is left out.
    episodes = [episode(1.0, -2.0, 4.0), episode(3.0, answer="yes"), episode(1.0, turns=2, answer="yes"), episode(9.0, 9.0)]
    rewards, found = to_go(reward, episodes, turns=4, counted=[True, True, True, False])
    assert found.total[0].tolist() == [[1.5, 1.0, 2.0, 0.0], [3.5, 0.0, 0.0, 0.0], [2.5, 2.0, 0.0, 0.0], [0.0] * 4]
    assert found.parts["episode_return"][0, 0].tolist() == [3.0, 2.0, 4.0, 0.0], "before weighting"
    assert found.parts["exact_match"][0, 2].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.counted[0].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0] * 4]
    for first, whole in ((found.total, rewards.total), (found.counted, rewards.counted), (found.correct, rewards.correct)):
        assert torch.equal(first[:, :, 0], whole)


def test_equal_ends_are_equal_to_the_bit_whatever_came_before():
    _, found = to_go(EpisodeReturn(), [episode(1e10, 0.7, 0.3), episode(1 / 3, 0.7, 0.3)], turns=3)
    one, other = found.total[0]
    assert torch.equal(one[1:], other[1:]) and one[0] != other[0]


def test_a_reward_for_a_set_pays_as_the_sets_own():
    by_set = RewardBySet({"games": FinalAnswer(EpisodeReturn()), "sums": ExactMatch()})
    for set_name, wanted in (("games", [3.0, 2.0]), ("sums", [0.0, 0.0])):
        assert to_go(by_set, [episode(1.0, 2.0)], turns=2, set_name=set_name)[1].total.flatten().tolist() == wanted


def test_turns_that_do_not_add_up_are_refused():
    class Half(EpisodeReturn):
        def __call__(self, completions, prompts):
            return [value / 2 for value in super().__call__(completions, prompts)]

    with pytest.raises(
        RewardError, match=r"Half.turn_rewards returned \[1.0, 2.0\] for 2 turns of the data row 0, but the reward is 1.5"
    ):
        to_go(Half(), [episode(1.0, 2.0)], turns=2)
