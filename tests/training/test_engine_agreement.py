"""How far an engine may be from the policy: levels at which a run warns, and stops, over its comparisons."""

import warnings
from concurrent.futures import Future

import pytest
import torch
from tiny_runs import build_policy

from hybrid_lightning.errors import RolloutError
from hybrid_lightning.rollout.interface import PromptLogprobs, WeightsVersion
from hybrid_lightning.training.agreement import Agreement
from hybrid_lightning.training.run import Run

IDS = [[3, 4, 5, 6, 7], [8, 9, 10]]
LOW_RATES = [6e-7, 6e-7, 0.0053, 0.012, 0.025, 0.045]  # of a run whose updates no longer arrive after its second rollout


class Engine:
    """Its log-probabilities are the policy's, but for a level that is set before each comparison."""

    is_remote, version, level = False, None, 0.0

    def __init__(self, policy, in_float32=True, name="server"):
        self.policy, self.in_float32, self.name = policy, in_float32, name

    def prompt_logprobs(self, token_ids):
        rows = []
        for ids in token_ids:
            values = self.policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            rows.append([float(values[place, ids[place + 1]]) + self.level for place in range(len(ids) - 1)])
        answer = Future()
        answer.set_result([PromptLogprobs(self.name, self.version, rows, self.in_float32)])
        return answer


@pytest.fixture
def compare(model):
    """Compares after each step with an engine at these levels; gives the comparisons and the warnings before it stopped."""

    def run(levels, in_float32=True, lowest=None, resumed=False, dtype="float32"):
        policy = build_policy(model, dtype=dtype).policy
        engine, state = Engine(policy, in_float32), Run()
        agreement, state.is_resumed = Agreement(policy, engine, state), resumed
        agreement.lowest.update({} if lowest is None else {engine.name: lowest})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")  # which shows an equal text once
            for state.step, engine.level in enumerate(levels):
                engine.version = WeightsVersion(state.step, "a")
                try:
                    agreement.begin(lambda: IDS)
                    agreement.end()
                except RolloutError as error:
                    return state.step, [str(warning.message) for warning in said], str(error)
        return agreement, [str(warning.message) for warning in said], ""

    return run


def test_updates_that_no_longer_arrive_stop_the_run_at_low_rates_too(compare):
    step, said, error = compare(LOW_RATES)
    assert (
        step == 4 and [f"at step {step}, more than 0.0001" in text for step, text in zip((2, 3), said, strict=True)] == [True] * 2
    )
    assert "differ from the policy's by 0.025 nats" in error and "they agreed before, to " in error
    assert "it has not taken the weights of the last updates" in error
    assert compare([6e-7, 6e-7, 2e-4, 2e-4, 2e-4])[0] == 4, "a rise that stays"
    assert compare([0.0053, 0.012, 0.02], lowest=6e-7, resumed=True)[0] == 2, "in a run that was stopped and resumed"


def test_a_rise_that_ends_or_that_rounding_explains_does_not_stop_a_run(compare):
    agreement, said, error = compare([6e-7, 0.0053, 0.012, 6e-7, 0.0053, 6e-7])
    assert not error and len(said) == 3 and not agreement.doubts
    assert compare([6e-7, *[8e-6] * 20])[1:] == ([], ""), "as in a run that diverged"
    assert compare([2e-3] * 5)[1:][1] == "" and len(compare([2e-3] * 5)[1]) == 5, "a GPU's rounding, from the start on"


def test_another_model_is_refused_in_float32_where_16_bits_could_be_that_far(compare):
    step, said, error = compare([0.29])
    assert step == 0 and not said and "it has another model, or does not support this one" in error
    assert "has not taken the weights that it was sent" in compare([0.29], resumed=True)[2]
    agreement, said, error = compare([0.29, 0.29, 0.34], in_float32=False)
    assert not error and len(said) == 3 and "0.34 nats" in agreement.doubts["server"], "and warned of as long as it lasts"
    assert not compare([0.29], dtype="bfloat16")[2], "of the policy"
    assert compare([0.6], in_float32=False)[2]
    assert compare([float("nan")], in_float32=False)[2]


def test_levels_of_16_bits_that_drift_neither_stop_a_run_nor_warn(compare):
    drift = [0.06 + 0.002 * step for step in range(60)]
    assert compare(drift, in_float32=False)[1:] == ([], "")
    assert compare([0.001, *drift], in_float32=False)[1:] == ([], ""), "where the first tokens were certain"
