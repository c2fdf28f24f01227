"""Rewards of episodes: the environment's own rewards, and rewards that score only the last message.

Any reward can score episodes. A completion's text is the policy's own text, without anything that an environment or a tool added;
`completion.episode` has the conversation by roles, how it ended, and the counts.

`rewards_to_go` assigns rewards to the turns that earn them. Axes: P prompts, G episodes of each, K turns.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards.reward_function import DelegatingReward, RewardFunction
from hybrid_lightning.shared.user_code import in_user_code
from hybrid_lightning.types import Completion, Episode, Prompt, Rewards


class EpisodeReturn(RewardFunction):
    """The sum of the environment's rewards in the turns of an episode, or what its agent returned; 1 means solved.

    Example:
        >>> episode = Episode(messages=(), turns=2, end="over", rewards=(0.25, 0.75))
        >>> EpisodeReturn()([Completion("4\\n5", 4, True, episode=episode)], [Prompt(text="Guess")])
        [1.0]
    """

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Add up the environment's rewards.

        Raises:
            RewardError: If a completion is not an episode.
        """
        return [float(sum(_episode(completion).rewards)) for completion in completions]

    def turn_rewards(self, completion: str, prompt: Prompt) -> Sequence[float]:
        """The environment's reward in each turn."""
        return _episode(completion).rewards


class FinalAnswer(DelegatingReward):
    """Scores only the last message of an episode, as if it were the whole completion; its token count is the episode's.

    Args:
        reward: Scores that message.
    """

    def __init__(self, reward: RewardFunction) -> None:
        super().__init__([reward])
        self.reward = reward

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float] | Tensor:
        """Score the last messages.

        Raises:
            RewardError: If a completion is not an episode.
        """
        return self.reward([self.seen(completion) for completion in completions], prompts)

    def seen(self, completion: str) -> Completion:
        """The last message."""
        episode = _episode(completion)
        assert isinstance(completion, Completion)
        return Completion(episode.answer, completion.num_tokens, completion.finished, completion.thinking, episode)

    @property
    def name(self) -> str:
        """The reward's name."""
        return self.reward.name

    def terms(self) -> list[tuple[RewardFunction, float]]:
        """The terms of the reward, each for the last message."""
        own = self.reward.terms()
        return [(self, 1.0)] if own == [(self.reward, 1.0)] else [(FinalAnswer(term), weight) for term, weight in own]


def rewards_to_go(
    reward: RewardFunction, completions: Sequence[str], prompts: Sequence[Prompt], rewards: Rewards, turns: int
) -> Rewards:
    """The rewards of each turn and all later ones ("reward to go"), for credit by turn (see the head of `advantages`).

    The values of `RewardFunction.turn_rewards` are paid for their turns, any other reward for the last turn.

    Args:
        reward: The reward function that computed `rewards`.
        completions: P * G episodes.
        prompts: The prompt of each episode.
        rewards: Their rewards, [P, G].
        turns: K, at least the number of turns in the longest episode.

    Returns:
        Rewards [P, G, K] on the same device, from each turn on: those from the first turn on equal `rewards`. An episode that
        ended earlier does not count for a turn.

    Raises:
        RewardError: If the rewards of the turns do not add up to the episode's reward.

    Example:
        >>> episode = Episode(messages=(), turns=2, end="over", rewards=(0.25, 0.5))
        >>> completions, prompts = [Completion("4\\n5", 4, True, episode=episode)], [Prompt(text="Guess")]
        >>> paid = torch.tensor([[0.75]])
        >>> rewards = Rewards(paid, {"episode_return": paid}, torch.tensor([[False]]))
        >>> to_go = rewards_to_go(EpisodeReturn(), completions, prompts, rewards, turns=3)
        >>> to_go.total.tolist(), to_go.counted.tolist()
        ([[[0.75, 0.5, 0.0]]], [[[True, True, False]]])
    """
    lasts = [_episode(completion).turns for completion in completions]
    counted = torch.arange(turns) < torch.tensor(lasts)[:, None]  # [P * G, K]
    if rewards.counted is not None:
        counted = counted & rewards.counted.cpu().view(-1, 1)
    total, parts = torch.zeros(counted.shape, dtype=torch.float64), {}
    for term, weight in reward.terms():
        paid, values = torch.zeros_like(total), rewards.parts[term.name].flatten().tolist()
        for number, (completion, prompt, value) in enumerate(zip(completions, prompts, values, strict=True)):
            if bool(counted[number, 0]):
                paid[number, : lasts[number]] = _paid(term, completion, prompt, value, lasts[number])
        to_go = paid.flip(1).cumsum(1).flip(1)  # from the end, so that equal ends are equal whatever came before
        total += weight * to_go
        parts[term.name] = _after_first(rewards.parts[term.name], to_go)
    return replace(
        rewards,
        total=_after_first(rewards.total, total),
        parts=parts,
        correct=rewards.correct[:, :, None].expand(-1, -1, turns),
        counted=counted.view(*rewards.total.shape, turns).to(rewards.total.device),
    )


def _paid(term: RewardFunction, completion: str, prompt: Prompt, value: float, turns: int) -> Tensor:
    """The payment for each turn of an episode from a reward of this value, [turns] float64."""
    with in_user_code(term, "turn_rewards"):
        given = term.turn_rewards(completion, prompt)
    given = [*[0.0] * (turns - 1), value] if given is None else list(given)
    if len(given) > turns or not math.isclose(sum(given), value, rel_tol=1e-4, abs_tol=1e-4):
        raise RewardError(
            f"{type(term).__name__}.turn_rewards returned {given} for {turns} turns of {prompt.place}, but the reward is "
            f"{value:g}; it must return at most one number per turn, and they must add up to the reward"
        )
    return torch.tensor(given + [0.0] * (turns - len(given)), dtype=torch.float64)


def _after_first(first: Tensor, values: Tensor) -> Tensor:
    """Values of K turns, [P, G, K], from [P * G, K], with `first` [P, G] for the first turn."""
    return torch.cat([first[:, :, None], values[:, 1:].to(first).view(*first.shape, -1)], dim=2)


def _episode(completion: str) -> Episode:
    episode = getattr(completion, "episode", None)
    if not isinstance(episode, Episode):
        raise RewardError(
            "the reward scores episodes, and a completion is not one; set model.environment or model.agent, or use another reward"
        )
    return episode
