import torch

from hybrid_lightning.policy.update import StepMetrics


def run(micro_batches, *updates):
    metrics = StepMetrics()
    results = []
    for shares in updates:
        result = metrics.update({name: torch.tensor(value) for name, value in shares.items()}, micro_batches)
        results.append({name: float(value) for name, value in result.items()})
    return results


def test_shares_add_up_and_of_maxima_the_largest_counts():
    first, second = run(2, {"loss": 1.0, "ratio/max": 3.0}, {"loss": 0.5, "ratio/max": 2.0})
    assert first == {"loss": 1.0, "ratio/max": 3.0}
    assert second == {"loss": 1.5, "ratio/max": 3.0}


def test_of_minima_the_smallest_counts():
    results = run(2, *[{"weight/min": value} for value in (0.5, 0.75, 2.0)])
    assert results == [{"weight/min": 0.5}, {"weight/min": 0.5}, {"weight/min": 2.0}]


def test_the_next_step_starts_anew():
    results = run(2, *[{"loss": value, "ratio/max": value} for value in (8.0, 4.0, 2.0, 1.0)])
    assert results[2] == {"loss": 2.0, "ratio/max": 2.0}
    assert results[3] == {"loss": 3.0, "ratio/max": 2.0}


def test_what_is_returned_is_not_changed_later():
    metrics = StepMetrics()
    share = torch.tensor(1.0)
    first = metrics.update({"loss": share}, 3)["loss"]
    metrics.update({"loss": share}, 3)
    assert float(first) == 1.0 and float(share) == 1.0


def test_a_name_that_comes_later_in_a_step_is_taken_in():
    assert run(2, {"loss": 1.0}, {"loss": 1.0, "kl": 0.5})[1] == {"loss": 2.0, "kl": 0.5}
