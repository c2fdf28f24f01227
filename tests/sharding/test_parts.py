"""Each rank keeps its part of weights, gradients and optimizer state, and no more, between the steps."""

import pytest
from lightning.pytorch import Callback
from ranks_of_tests import run
from runs_of_tests import train
from test_equal_to_one_process import ADAM, STRATEGIES
from torch.distributed.tensor import DTensor


class Sizes(Callback):
    """Numbers that a rank holds of weights and gradients before an optimizer step, and of the optimizer's state after it."""

    def __init__(self):
        self.held = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for p in pl_module.model.parameters() if p.numel()]
        self.held["weights"] = sum(local(p).numel() for p in parameters)
        self.held["gradients"] = sum(local(p.grad).numel() for p in parameters if p.grad is not None)

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        self.held["state"] = sum(local(value).numel() for value in state)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure(**arguments):
    sizes = Sizes()
    train(callbacks=(sizes,), policy={**ADAM}, max_steps=2, **arguments)
    return sizes.held


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_the_parts_of_all_ranks_are_the_whole(folder, tmp_path, strategy):
    whole = measure(folder=folder, root=tmp_path / "one")
    assert whole["state"] == 2 * whole["gradients"] > 0
    arguments = {"folder": folder, "root": tmp_path / "run", "strategy": STRATEGIES[strategy], "devices": 2}
    parts = run(2, tmp_path / "ranks", measure, **arguments)
    for name, size in whole.items():
        assert sum(part[name] for part in parts) == size, name
    assert all(0.4 < part["weights"] / whole["weights"] < 0.6 for part in parts)
    assert all(part["gradients"] < whole["gradients"] for part in parts)
