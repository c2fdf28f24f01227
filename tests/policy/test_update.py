import torch

from hybrid_lightning.policy.update import StepMetrics


def run(micro_batches, *updates):
    metrics = StepMetrics()
    results = []
    for shares in updates:
        result = metrics.update({name: torch.tensor(value) for name, value in shares.items()}, micro_batches)
        results.append({name: float(value) for name, value in result.items()})
    return results


def test_shares_add_up_of_extremes_one_counts_and_the_next_step_starts_anew():
    named = [{"loss": value, "ratio/max": value, "weight/min": value} for value in (4.0, 8.0, 2.0, 1.0)]
    results = run(2, *named, {"loss": 1.0}, {"loss": 1.0, "kl": 0.5})
    assert results[:4] == [
        {"loss": 4.0, "ratio/max": 4.0, "weight/min": 4.0},
        {"loss": 12.0, "ratio/max": 8.0, "weight/min": 4.0},
        {"loss": 2.0, "ratio/max": 2.0, "weight/min": 2.0},
        {"loss": 3.0, "ratio/max": 2.0, "weight/min": 1.0},
    ]
    assert results[5] == {"loss": 2.0, "kl": 0.5}, "a name that comes later in a step"


def test_what_is_returned_is_not_changed_later():
    metrics, share = StepMetrics(), torch.tensor(1.0)
    first = metrics.update({"loss": share}, 3)["loss"]
    metrics.update({"loss": share}, 3)
    assert float(first) == 1.0 and float(share) == 1.0
