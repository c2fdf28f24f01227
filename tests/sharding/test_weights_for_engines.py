"""Weights that are split over ranks come to a rollout engine as those of one process do."""

import pytest
import torch
from ranks_of_tests import run
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, write_model, write_sums

from hybrid_lightning.policy.current_weights import CurrentWeights
from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy

STRATEGIES = {
    "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo"),
    "fsdp1": lambda: FSDP1Strategy(process_group_backend="gloo"),
    "one": lambda: "auto",
}


def weights(model, sums, root, strategy):
    """All weights of a policy that has been trained by two steps, and their shapes as they are known without gathering them."""
    torch.manual_seed(0)
    policy = build_policy(model)
    devices = 1 if strategy == "one" else 2
    trainer = build_trainer(root, build_adapter(), strategy=STRATEGIES[strategy](), devices=devices, max_steps=2)
    found = {}

    class Last(type(policy)):
        def on_train_end(self):
            current = CurrentWeights(self.model, self.weights, "base", 2, True)
            for everything in (True, False):
                values = {}
                for weight in current.stream(everything):
                    values[weight.name] = torch.empty(weight.shape)
                    weight.write_rows(values[weight.name], 0)
                assert {name: tuple(value.shape) for name, value in values.items()} == current.shapes(everything)
                found[everything] = values
            found["version"] = str(current.version)

    policy.__class__ = Last
    trainer.fit(policy, datamodule=build_data(sums))
    return found


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_split_weights_come_whole_on_every_rank(tmp_path, strategy):
    model, sums = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl")
    first, second = run(2, tmp_path / "ranks", weights, model=model, sums=sums, root=tmp_path / "a", strategy=strategy)
    alone = run(1, tmp_path / "alone", weights, model=model, sums=sums, root=tmp_path / "b", strategy="one")[0]
    assert first["version"] == second["version"]
    for everything in (True, False):
        assert list(first[everything]) == list(second[everything]) == list(alone[everything])
        for name, value in first[everything].items():
            assert torch.equal(value, second[everything][name])
            # Two ranks add gradients in another order; Adam's first steps are of the size of the rate, 1e-2.
            torch.testing.assert_close(value, alone[everything][name], atol=1e-3, rtol=1e-3)
