import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import Log, fit

from hybrid_lightning.callbacks import RewardDivergence
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rewards import RewardFunction, WeightedSum
from hybrid_lightning.types import Rewards


class HasDigit(RewardFunction):
    def __call__(self, completions, prompts):
        return [float(any(c.isdigit() for c in text)) for text in completions]


class Ended(RewardFunction):
    measures_correctness = False

    def __call__(self, completions, prompts):
        return [float(len(text) < 6) for text in completions]


def feed(callback, accuracies, left_out=False, **parts):
    """Give the callback one rollout of 100 completions for each accuracy; returns the messages of its warnings."""
    trainer, messages = SimpleNamespace(global_step=0), []
    for step, accuracy in enumerate(accuracies):
        correct = torch.arange(100) < 100 * accuracy
        values = {name: torch.full((100,), series[step]) for name, series in parts.items()}
        counted = torch.ones(100, dtype=torch.bool)
        if left_out:  # beside one that is left out
            correct, counted = (F.pad(value, (0, 1), value=end) for value, end in ((correct, True), (counted, False)))
            values = {name: F.pad(value, (0, 1), value=torch.nan) for name, value in values.items()}
        rollout = (None, Rewards(correct.float(), {"match": correct.float(), **values}, correct, counted=counted), None)
        trainer.global_step = step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # every micro-batch of a rollout brings the same one
                callback.on_train_batch_start(trainer, SimpleNamespace(last_rollout=rollout), None, 0)
        messages += [str(warning.message) for warning in caught]
    return messages


def series(start, end, count=20, noise=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [start + (end - start) * i / (count - 1) + noise * float(torch.randn((), generator=generator)) for i in range(count)]


def test_each_part_is_warned_of_on_its_own():
    up = series(0.1, 0.9, 40, seed=1)
    for left_out in (False, True):
        rose = {"ended": up, "flat": series(0.5, 0.5, 40, seed=2), "other": up}
        messages = feed(RewardDivergence(20), series(0.5, 0.1, 40), left_out, **rose)
        assert sorted(message.split()[0] for message in messages) == ["rewards/ended", "rewards/other"], "and once"
    fell = "rose while the share of correct completions fell over the last 20 rollouts (step "
    assert all(fell in message and message.endswith("lower its weight or remove it") for message in messages)


OTHERS = {
    "both rise": (series(0.1, 0.5, 40), series(0.1, 0.9, 40, seed=1)),
    "both fall": (series(0.5, 0.1, 40), series(0.9, 0.1, 40, seed=1)),
    "no fall": (series(0.3, 0.3, 40), series(0.1, 0.9, 40, seed=1)),
    "constant": ([0.5] * 40, [0.5] * 40),
    "too short": (series(0.5, 0.1, 19), series(0.1, 0.9, 19, seed=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_warned_of(name):
    accuracy, ended = OTHERS[name]
    assert feed(RewardDivergence(20), accuracy, ended=ended) == []


def test_changes_without_any_noise_count():
    assert len(feed(RewardDivergence(4), [0.5, 0.5, 0.4, 0.4], ended=[0.0, 0.0, 1.0, 1.0])) == 1


def test_the_window_forgets():
    callback = RewardDivergence(10)
    feed(callback, series(0.5, 0.1, 10), ended=series(0.1, 0.9, 10, seed=1))
    assert callback.diverging() == ["rewards/ended"]
    feed(callback, series(0.1, 0.1, 10), ended=series(0.9, 0.9, 10, seed=1))
    assert callback.diverging() == []


def test_a_resumed_run_warns_where_the_whole_would(stop=25):
    accuracy, ended = series(0.5, 0.1, 40), series(0.1, 0.9, 40, seed=1)
    whole = feed(RewardDivergence(20), accuracy, ended=ended)
    before = RewardDivergence(20)
    messages = feed(before, accuracy[:stop], ended=ended[:stop])
    resumed = RewardDivergence(20)
    resumed.load_state_dict(before.state_dict())
    assert len(whole) == len(messages + feed(resumed, accuracy[stop:], ended=ended[stop:])) == 1
    assert resumed.diverging() == ["rewards/ended"]


def test_a_run_that_learns_to_end_at_once_is_warned_of(model, sums, tmp_path):
    """The trap that this callback is for: a small reward for ending is learned at the cost of the answer."""
    log = Log()
    reward = WeightedSum([HasDigit(), Ended()], [0.1, 1.0])
    policy = {"reward": reward, "samples_per_prompt": 16, "lr_lora": 0.003, "lr_full": 0.001}
    with pytest.warns(UserWarning, match="rewards/ended rose while the share of correct completions fell"):
        fit(model, sums, tmp_path, RewardDivergence(16), log, policy=policy, max_steps=24)
    first, last = log.metrics[0], log.metrics[-1]
    assert last["reward"] > first["reward"] and last["rewards/ended/mean"] > first["rewards/ended/mean"]
    assert last["accuracy"] < first["accuracy"]


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"divergence\.window must be an even number of at least 4, got 7"):
        RewardDivergence(7)
    with pytest.raises(ConfigError, match=r"divergence\.standard_errors must be positive, got 0"):
        RewardDivergence(standard_errors=0.0)
