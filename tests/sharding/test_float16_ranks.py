"""In float16 with a scaled loss every strategy makes the run of one process, and all ranks leave out the same steps."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from ranks_of_tests import run
from runs_of_tests import Only, train
from test_equal_to_one_process import ADAM, STRATEGIES

from hybrid_lightning.losses import GRPOLoss

PROMPTS = tuple(range(0, 24, 3))


class Scales(Callback):
    """Begins with a scale, and notes what becomes of it."""

    def __init__(self, first):
        self.first, self.scales = first, []

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler._init_scale = self.first

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def train_scaled(scales, strategy="auto", **arguments):
    """Runs that begin with these scales. FSDP1 scales by itself; the others by what Lightning wants of them on a CPU."""
    results = []
    for first in scales:
        log = Scales(first)
        mine = {"precision": "16-mixed"} if strategy is STRATEGIES["fsdp1"] else {"plugins": [MixedPrecision("16-mixed", "cpu")]}
        # Of some prompts alone completions earn different rewards, so that ranks overflow one by one.
        policy = {**ADAM, "loss": GRPOLoss(kl_coef=0.02), "reward": Only(PROMPTS), "epochs_per_rollout": 2}
        # The steps of one rollout: of weights that differ by float16's rounding the next one may draw another token.
        found = train(strategy=strategy, policy=policy, callbacks=(log,), max_steps=4, **mine, **arguments)
        results.append({**found, "scales": log.scales})
    return results


def train_under_each(root, **arguments):
    return {name: train_scaled(root=root / name, strategy=strategy, **arguments) for name, strategy in STRATEGIES.items()}


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("float16")
    return run(1, root / "process", train_scaled, scales=[2.0**10], folder=folder, root=root / "one")[0]


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    """The runs of each rank, by strategy."""
    root = tmp_path_factory.mktemp("sharded")
    arguments = {"folder": folder, "root": root / "run", "devices": 2, "scales": [2.0**10, 2.0**22]}
    return run(2, root / "ranks", train_under_each, timeout_s=240, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_the_run_of_one_process(single, sharded, strategy):
    ranks = [found[strategy] for found in sharded]
    for found, _ in ranks:
        (expected,) = single
        assert found["plan"] == expected["plan"] and found["scales"] == expected["scales"] == [2.0**10] * 4
        for one, other in zip(found["steps"], expected["steps"], strict=True):
            assert one == pytest.approx(other, rel=5e-3, abs=1e-3)
        for name, weight in expected["weights"].items():
            assert (found["weights"][name] - weight).norm() < 1e-3 * weight.norm() + 1e-4, name
    (_, first), (_, second) = ranks
    assert first["scales"] == second["scales"] and 2.0**21 >= first["scales"][0] > first["scales"][-1]
    assert all(
        torch.equal(weight, second["weights"][name]) and weight.isfinite().all() for name, weight in first["weights"].items()
    )
