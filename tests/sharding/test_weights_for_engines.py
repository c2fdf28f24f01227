"""Weights that are split over ranks come to a rollout engine as those of one process do."""

import torch
from ranks_of_tests import run
from tiny_runs import build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.policy.current_weights import CurrentWeights
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy


def weights_of_each(model, sums, root, strategies, devices):
    return [weights(model, sums, root / str(number), make(), devices) for number, make in enumerate(strategies)]


def weights(model, sums, root, strategy, devices):
    """All weights of a policy that has been trained by two steps, and their shapes as they are known without gathering them."""
    torch.manual_seed(0)
    policy = build_policy(model)
    trainer = build_trainer(root, build_adapter(), strategy=strategy, devices=devices, max_steps=2)
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


def test_split_weights_come_whole_on_every_rank(folder, tmp_path):
    arguments = {"model": folder / "model", "sums": folder / "sums.jsonl"}
    split = {"root": tmp_path / "a", "strategies": (FSDP2Strategy, FSDP1Strategy), "devices": 2}
    ranks = run(2, tmp_path / "ranks", weights_of_each, **arguments, **split)
    alone = weights(**arguments, root=tmp_path / "b", strategy="auto", devices=1)
    for first, second in zip(*ranks, strict=True):
        assert first["version"] == second["version"]
        for everything in (True, False):
            assert list(first[everything]) == list(second[everything]) == list(alone[everything])
            for name, value in first[everything].items():
                assert torch.equal(value, second[everything][name])
                # Two ranks add gradients in another order; Adam's first steps are of the size of the rate, 1e-2.
                torch.testing.assert_close(value, alone[everything][name], atol=1e-3, rtol=1e-3)
