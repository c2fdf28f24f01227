import itertools

import pytest
import torch

from hybrid_lightning.metrics import CompletionMetrics, pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        flags = [True] * correct + [False] * (samples - correct)
        subsets = list(itertools.combinations(flags, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert float(pass_at_k(samples, torch.tensor([correct]), k)) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="between 1 and the number of samples 4, got 5"):
        pass_at_k(4, torch.tensor([1]), 5)


def test_repeated_prompts_count_once():
    metric = CompletionMetrics(2)
    correct = torch.tensor([[True, True], [False, True]])
    metric.update(torch.tensor([3, 5]), correct, correct.float(), torch.tensor([[2, 4], [6, 8]]))
    metric.update(torch.tensor([5]), correct[1:], correct[1:].float(), torch.tensor([[6, 8]]))
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx({"avg@2": 0.75, "pass@2": 1.0, "reward": 0.75, "length": 5.0})
    metric.reset()
    assert metric.compute() == {}


def test_avg_and_pass_differ_where_groups_are_mixed():
    metric = CompletionMetrics(4)
    correct = torch.tensor([[True, False, False, False], [False] * 4])
    metric.update(torch.tensor([0, 1]), correct, correct.float(), torch.ones(2, 4))
    values = metric.compute()
    assert float(values["avg@4"]) == pytest.approx(1 / 8)
    assert float(values["pass@2"]) == pytest.approx(0.25)
    assert float(values["pass@4"]) == pytest.approx(0.5)
